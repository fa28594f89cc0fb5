"""Other tools: what hdb writes for them, and what it reads of theirs.

`merge` and `merged_files` write a full checkpoint tensor by tensor, `export` a LoRA file;
`lora_readers` and `diffusers_reader` check how other tools read it; `lora_stack` puts LoRA files of
others under an identity. May import model, method, faces and registry.
"""
