"""Blend a network with what further training made of it: weights between the two keep what both are
good at (Wortsman et al. 2022, "Robust fine-tuning of zero-shot models")."""

from __future__ import annotations

from pathlib import Path

from safetensors import safe_open
from safetensors.torch import load_file

from registry.checkpoints.safetensors import save_tensors
from registry.errors import HdbError


def blend(before: Path, after: Path, share: float, out: Path) -> None:
    """Write (1 - share) of `before` and share of `after`, with the metadata of `after`."""
    one, other = load_file(before), load_file(after)
    if one.keys() != other.keys() or any(one[k].shape != other[k].shape for k in one):
        raise HdbError(f"{before} and {after} are not two states of one network")
    with safe_open(after, framework="pt") as file:
        metadata = file.metadata()
    mixed = {k: one[k].float().lerp(other[k].float(), share).to(one[k].dtype) for k in one}
    save_tensors(mixed, out, metadata)
