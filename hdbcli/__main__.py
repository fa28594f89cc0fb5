"""Run hdb as `python -m hdbcli`."""

from hdbcli.cli import main

main()
