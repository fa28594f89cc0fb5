"""The heavy benchmarks of `hdb bench`: true sizes, devices, and people held out.

They belong to the repository, not to the package: `hdb bench` finds them beside it in a clone. They
may import all of hdbcli and registry; nothing there imports them.
"""
