"""A base model in use: loaded, held within memory, and asked for pictures.

`base` is the loaded model with LiDB layers on its targets; `device`, `memory` and `quantise` decide
where and in what numbers it runs; `sample` draws; `files` reads its weights without loading it.
May import method, faces and registry.
"""
