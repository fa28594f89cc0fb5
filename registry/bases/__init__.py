"""Base models of the user: settings, added ones, and the Hugging Face hub.

`settings` are one small JSON file a base, `added` are models that `hdb base add` took in, `hub`
finds their source. May import stable_diffusion, checkpoints, the store and below; never hdbcli.
"""
