"""What is known: base models, metrics, and the identities made on them; never imports hdbcli.

`spec` and `metric` say what a plug-in must offer, `plugins` finds them, `store` keeps identities,
`files` writes files whole or not at all. Inside, `plugins -> bases -> stable_diffusion ->
checkpoints -> spec, files, errors`: a module imports from its own place in that line or below.
"""
