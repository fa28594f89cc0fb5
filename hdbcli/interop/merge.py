"""Merge an identity into its base model: a full checkpoint that needs no hdb.

The base's files are copied tensor by tensor, byte for byte; only the targets' weights are computed,
W + up_basis @ core @ down_basis in float32 with one cast at the end. No model is loaded, so memory
stays small whatever its size.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from hdbcli.method import basis
from hdbcli.method.lidb import Theta
from hdbcli.model.files import MERGED, Checkpoint, Place
from registry.checkpoints.ldm import Renamed, canonical, layout_of, original_names, rename
from registry.checkpoints.safetensors import Item, TensorInfo, chunks_of, dtype_of
from registry.errors import HdbError, UsageError

ROWS = 1024  # of a weight, computed at a time
CASTS = {"fp32": "F32", "fp16": "F16", "bf16": "BF16"}


class Merge:
    """A base's tensors with an identity in them, each made when its turn comes."""

    def __init__(self, checkpoint: Checkpoint, theta: Theta, dtype: str | None) -> None:
        """Take one identity (a batch of 1); `dtype` None leaves every tensor in its own."""
        if dtype is not None and dtype not in CASTS:
            raise UsageError(f"unknown dtype {dtype!r}; choose one of {', '.join(CASTS)}")
        self.checkpoint = checkpoint
        self.cast = dtype and CASTS[dtype]
        cores = theta.up[0].float() @ theta.down[0].float()  # (L, b, a)
        self.cores = dict(zip(checkpoint.places, cores, strict=True))
        self.targets: dict[tuple[Path, str], dict[str, Place]] = {}
        for name, place in checkpoint.places.items():
            if self.cores[name].any():  # W + 0 would turn -0 into 0
                self.targets.setdefault((place.file, place.key), {})[name] = place

    def items(self, file: Path) -> list[Item]:
        """List what becomes of a file's tensors, in its own order; those of a single file get the
        original names, which every reader knows."""
        tensors = self.checkpoint.headers[file].tensors
        names = original_names(tensors) if self.checkpoint.single else {}
        order = sorted(tensors, key=lambda key: tensors[key].offsets)
        return [
            Item(
                names.get(key, key),
                self._dtype(tensors[key]),
                tensors[key].shape,
                partial(self._chunks, file, key),
            )
            for key in order
        ]

    def single_file(self) -> list[Item]:
        """List the tensors of a diffusers folder as a single file names and stacks them."""
        layout = layout_of(self.checkpoint.spec.family)
        parts: dict[str, dict[int, tuple[Path, str, Renamed]]] = {}
        for component, files in self.checkpoint.files.items():
            for file in files:
                for key in self.checkpoint.headers[file].tensors:
                    place = rename(component, canonical(component, key), layout)
                    if place:
                        parts.setdefault(place.key, {})[place.part] = (file, key, place)
        items = [
            self._joined(key, [found[i] for i in sorted(found)]) for key, found in parts.items()
        ]
        return sorted(items, key=lambda item: (-item.width, item.key))  # aligned

    def _joined(self, key: str, parts: list[tuple[Path, str, Renamed]]) -> Item:
        infos = [self.checkpoint.headers[file].tensors[source] for file, source, _ in parts]
        place = parts[0][2]
        if len(parts) != place.parts:
            raise HdbError(f"{key} needs {place.parts} tensors of the base, {len(parts)} are there")
        shape = infos[0].shape
        if place.parts > 1:
            shape = (sum(info.shape[0] for info in infos), *shape[1:])
        elif place.conv:
            shape = (*shape, 1, 1)[:4]
        elif place.transposed:
            shape = shape[::-1]

        def chunks() -> Iterator[bytes | bytearray]:
            for file, source, _ in parts:
                if place.transposed:
                    yield _bytes(self._tensor(file, source).T)
                else:
                    yield from self._chunks(file, source)

        return Item(key, self._dtype(infos[0]), shape, chunks)

    def _dtype(self, info: TensorInfo) -> str:
        return self.cast if self.cast and info.dtype in MERGED else info.dtype

    def _chunks(self, file: Path, key: str) -> Iterable[bytes | bytearray]:
        header = self.checkpoint.headers[file]
        info = header.tensors[key]
        if (file, key) not in self.targets and self._dtype(info) == info.dtype:
            return chunks_of(header, key)
        if (file, key) in self.targets:
            return map(_bytes, self._sums(file, key, info))
        return [_bytes(self._tensor(file, key))]

    def _tensor(self, file: Path, key: str) -> Tensor:
        header = self.checkpoint.headers[file]
        return header.tensor(key).to(dtype_of(self._dtype(header.tensors[key])))

    def _sums(self, file: Path, key: str, info: TensorInfo) -> Iterator[Tensor]:
        """Yield W + dW, some rows at a time, wherever targets lie in a tensor."""
        tensor = self.checkpoint.headers[file].tensor(key)
        placed = self.targets[file, key]
        factors = {name: self._factors(name, place.shape) for name, place in placed.items()}
        for start in range(0, len(tensor), ROWS):
            block = tensor[start : start + ROWS].float()
            for name, place in placed.items():
                low = max(start, place.first)
                high = min(start + len(block), place.first + place.shape[0])
                if low < high:
                    up, down = factors[name]
                    rows = up[low - place.first : high - place.first]
                    block[low - start : high - start] += (rows @ down).view(-1, *block.shape[1:])
            block = block.to(dtype_of(self._dtype(info)))
            if not block.isfinite().all():
                raise HdbError(f"{key!r} gets numbers that are not finite; is the base damaged?")
            yield block

    def _factors(self, name: str, shape: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Return the factors (n, b), (b, m) of dW in float32."""
        spec, (n, m) = self.checkpoint.spec, shape
        up = basis.up_basis(spec.basis_seed, name, spec.b, n)
        return up, self.cores[name] @ basis.down_basis(spec.basis_seed, name, spec.a, m)


def _bytes(tensor: Tensor) -> bytes:
    return tensor.reshape(-1).view(torch.uint8).numpy().tobytes()  # a single number has no axis
