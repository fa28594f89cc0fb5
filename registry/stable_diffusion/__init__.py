"""All that is Stable Diffusion: 1.x, 2.x and XL.

`families` are the versions as data, with their configurations in `configs`; `recognise` tells them
apart, `loading` loads one, `backbone` speaks to it, `tokenizer` is CLIP's. Nowhere else does hdb
know Stable Diffusion. May import checkpoints and below; never hdbcli.
"""
