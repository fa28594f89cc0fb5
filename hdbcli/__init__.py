"""HyperDreamBooth: from one photo to an identity, pictures and merged checkpoints.

The packages are layers, and a module imports from its own layer or from one below:
`cli -> api -> compare, bench -> training, identity, interop, measure -> model -> method, faces`,
all above `registry`, which knows base models and stored identities and imports nothing from here.
`config` holds the defaults of every stage, `errors` the one error; everybody may import both.
"""

__version__ = "0.1.0"
