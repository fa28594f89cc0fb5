"""Run hdb: the console script, and `python -m hdbcli`."""

from __future__ import annotations

import sys


def main() -> None:
    """Run the command line; Ctrl-C ends it with a line already while it is imported."""
    try:
        from hdbcli.cli.main import main as run
    except KeyboardInterrupt:
        sys.stderr.write("interrupted; nothing was done\n")
        raise SystemExit(130) from None
    run()


if __name__ == "__main__":
    main()
