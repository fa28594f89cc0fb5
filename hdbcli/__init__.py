"""HyperDreamBooth: from one photo to an identity, pictures and merged checkpoints.

The packages are layers, and a module imports from its own layer or from one below:
`cli -> api -> compare, bench -> training, identity, interop, measure -> model -> method, faces`,
all above `registry`, which knows base models and stored identities and imports nothing from here.
`config` holds the defaults of every stage, `registry.errors` the one error; all may import both.
"""

from hdbcli.limits import set_threads

__version__ = "0.1.0"

set_threads()  # before anything imports torch: commands, notebooks, workers and tests come by here
