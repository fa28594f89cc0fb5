"""Run hdb: the console script, and `python -m hdbcli`."""

from __future__ import annotations

import gc
import sys

from hdbcli.limits import loading


def main() -> None:
    """Run the command line; Ctrl-C ends it with a line already while it is imported."""
    try:
        with loading():
            from hdbcli.cli.main import main as run
    except KeyboardInterrupt:
        sys.stderr.write("interrupted; nothing was done\n")
        raise SystemExit(130) from None
    gc.freeze()  # what is imported stays: no collection need look through it
    run()


if __name__ == "__main__":
    main()
