"""Checkpoints as files: safetensors, and the two layouts of a model.

`safetensors` checks headers without torch, and reads and writes tensors; `contents` reads what a
diffusers folder or a single file holds, `ldm` has the names of single files, `lora_formats`
recognises LoRA files of other tools.
Imports `registry.errors` and `registry.files` alone; never hdbcli.
"""
