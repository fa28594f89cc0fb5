"""Measures: how alike, how faithful to the prompt, how sure.

`metrics` are the judges of pictures, `faceres` the one that is fetched, `score` measures one
identity, `statistics` holds intervals and retrieval, `plot` draws curves. May import model, method,
faces and registry.
"""
