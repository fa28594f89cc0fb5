"""Tensors are written so that a file's hash says what is in it."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import safe_open

from registry.checkpoints.safetensors import read_tensors, save_tensors

TENSORS = {"b": torch.arange(6.0).view(2, 3), "a": torch.ones(3, dtype=torch.int64)}
METADATA = {name: f"über {name}" for name in "hgfedcba"}


def test_the_same_tensors_are_the_same_bytes(tmp_path: Path) -> None:
    files = [tmp_path / f"{k}.safetensors" for k in range(5)]
    for file in files:
        save_tensors(TENSORS, file, METADATA)
    assert len({file.read_bytes() for file in files}) == 1
    save_tensors({**TENSORS, "a": 2 * TENSORS["a"]}, files[1], METADATA)
    assert files[1].read_bytes() != files[0].read_bytes()


def test_the_library_reads_what_was_written(tmp_path: Path) -> None:
    save_tensors(TENSORS, tmp_path / "a.safetensors", METADATA)
    save_tensors(TENSORS, tmp_path / "b.safetensors")
    for name, metadata in (("a", METADATA), ("b", {})):
        with safe_open(tmp_path / f"{name}.safetensors", "pt") as file:
            assert (file.metadata() or {}) == metadata
            assert all(torch.equal(file.get_tensor(key), TENSORS[key]) for key in TENSORS)
    read, tensors = read_tensors(tmp_path / "a.safetensors")
    assert read == METADATA and tensors.keys() == TENSORS.keys()
