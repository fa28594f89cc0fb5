"""Run hdb as `python -m hdbcli`."""

from hdbcli.cli.main import main

main()
