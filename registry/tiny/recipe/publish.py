"""Publish a trained pipeline as the weights that ship: fp16, names that old and new readers
know."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file

from registry.checkpoints.ldm import canonical
from registry.checkpoints.safetensors import save_tensors
from registry.errors import HdbError

LIMIT = 60_000_000  # bytes of everything under weights/


def publish(build: Path, weights: Path) -> int:
    """Copy the pipeline, and hypernetwork and in-domain CLIP where they are, to `weights`; return
    the bytes there."""
    source = build / "pipeline"
    if not (source / "model_index.json").exists():
        raise HdbError(f"no pipeline in {source}; run the base step first")
    beside = weights.with_name(".weights.part")
    shutil.rmtree(beside, ignore_errors=True)
    shutil.copytree(source, beside)
    shutil.copytree(build / "vae", beside / "vae", dirs_exist_ok=True)  # its decoder trains on
    for file in beside.rglob("*.safetensors"):
        tensors = {canonical(file.parent.name, k): v for k, v in load_file(file).items()}
        half = {k: v.half() if v.is_floating_point() else v for k, v in tensors.items()}
        save_tensors(half, file, {"format": "pt"})
    for file in beside.rglob("config.json"):
        facts = json.loads(file.read_text())
        facts.pop("_name_or_path", None)  # where it was built, which says nothing elsewhere
        file.write_text(json.dumps(facts, indent=2, sort_keys=True) + "\n")
    for file in (build / "hypernetwork.safetensors", build / "clip.safetensors"):
        if file.exists():
            shutil.copy2(file, beside)
    size = sum(file.stat().st_size for file in beside.rglob("*") if file.is_file())
    if size > LIMIT:
        raise HdbError(f"the weights take {size:,} bytes, more than {LIMIT:,}; shrink a network")
    shutil.rmtree(weights, ignore_errors=True)
    beside.rename(weights)
    return size


def check_finite(weights: Path) -> None:
    """Raise HdbError if a published number is not finite (fp16 ends at 65,504)."""
    for file in weights.rglob("*.safetensors"):
        for name, tensor in load_file(file).items():
            if not torch.isfinite(tensor).all():
                raise HdbError(f"{file.name}: {name} does not fit fp16")
