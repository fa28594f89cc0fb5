"""The command line: every command parses, calls and prints.

One module per group of `hdb --help`, beside the options they share (`options`), tables and
progress (`render`), and the place where errors become a line and an exit code (`boundary`).
Only here is Typer imported; torch is imported inside commands, so that `hdb --help` needs none.
May import every other package; nothing imports it.
"""
