"""`hdb bench`: what hdb promises, measured against the plain alternative in the same run.

`suite` lists the benchmarks, `harness` times commands and code, and `random_model` writes models
of true size with random weights. What takes long lies in the repository's folder `benchmarks`.
May import compare and everything below it.
"""
