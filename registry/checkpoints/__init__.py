"""Checkpoints as files: safetensors headers, tensors, and the two layouts of a model.

`safetensors` checks headers without torch, `tensors` reads and writes numbers, `contents` reads
what a diffusers folder or a single file holds, `ldm` has the names of single files, `lora_formats`
recognises LoRA files of other tools.
Imports `registry.errors` and `registry.files` alone; never hdbcli.
"""
