"""Publish a trained pipeline as the weights that ship: fp16, names that old and new readers
know."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from registry.checkpoints.ldm import canonical
from registry.checkpoints.safetensors import read_tensors, save_tensors
from registry.errors import HdbError

LIMIT = 60_000_000  # bytes of everything under weights/


def publish(build: Path, weights: Path, halfway: bool = False) -> int:
    """Copy the pipeline, and hypernetwork and in-domain CLIP where they are, to `weights`; return
    the bytes there.

    `halfway` writes the means of all numbers and of those that ship, which is what a training
    that began from them may end best with (Wortsman et al. 2022, "Model soups").
    """
    source = build / "pipeline"
    if not (source / "model_index.json").exists():
        raise HdbError(f"no pipeline in {source}; run the base step first")
    beside = weights.with_name(".weights.part")
    shutil.rmtree(beside, ignore_errors=True)
    shutil.copytree(source, beside)
    shutil.copytree(build / "vae", beside / "vae", dirs_exist_ok=True)  # its decoder trains on
    for name in ("hypernetwork.safetensors", "clip.safetensors"):
        for folder in (build, weights):  # what was not trained anew stays
            if (folder / name).exists():
                shutil.copy2(folder / name, beside)
                break
    for file in beside.rglob("*.safetensors"):
        metadata, tensors = read_tensors(file)
        tensors = {canonical(file.parent.name, k): v for k, v in tensors.items()}
        if halfway:
            tensors = _means(tensors, load_file(weights / file.relative_to(beside)))
        half = {k: v.half() if v.is_floating_point() else v for k, v in tensors.items()}
        save_tensors(half, file, metadata)
        file.chmod(0o644)
    for file in (beside / "model_index.json", *beside.rglob("config.json")):
        facts = json.loads(file.read_text())
        facts.pop("_name_or_path", None)  # where it was built, which says nothing elsewhere
        file.write_text(json.dumps(facts, indent=2, sort_keys=True) + "\n")
    size = sum(file.stat().st_size for file in beside.rglob("*") if file.is_file())
    if size > LIMIT:
        raise HdbError(f"the weights take {size:,} bytes, more than {LIMIT:,}; shrink a network")
    shutil.rmtree(weights, ignore_errors=True)
    beside.rename(weights)
    return size


def _means(mine: dict[str, Tensor], theirs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the means of two files' numbers; raise HdbError if they are of two networks."""
    own, other = ({k: v.shape for k, v in each.items()} for each in (mine, theirs))
    if own != other:
        raise HdbError("what was trained is another network than what ships: leave --halfway out")
    floats = {k: torch.lerp(v.float(), theirs[k].float(), 0.5) for k, v in mine.items()}
    return {k: floats[k] if v.is_floating_point() else v for k, v in mine.items()}


def check_finite(weights: Path) -> None:
    """Raise HdbError if a published number is not finite (fp16 ends at 65,504)."""
    for file in weights.rglob("*.safetensors"):
        for name, tensor in load_file(file).items():
            if not torch.isfinite(tensor).all():
                raise HdbError(f"{file.name}: {name} does not fit fp16")
