"""Write a safetensors file tensor by tensor, so that memory holds one of them at a time."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

from registry.checkpoints.safetensors import DTYPE_BYTES, TensorInfo, header_bytes
from registry.files import flush

HASH = "modelspec.hash_sha256"
CHUNK = 2**23  # bytes copied at a time


@dataclass(frozen=True)
class Item:
    """One tensor to come: its entry in the header, and the chunks of its bytes when their
    turn comes."""

    key: str
    dtype: str
    shape: tuple[int, ...]
    chunks: Callable[[], Iterable[bytes | bytearray]]

    @property
    def width(self) -> int:
        return DTYPE_BYTES[self.dtype]

    @property
    def bytes(self) -> int:
        return self.width * math.prod(self.shape)


def write_tensors(
    path: Path, items: Sequence[Item], metadata: Mapping[str, str], tell: Callable[[int], None]
) -> str:
    """Write the file and return the sha256 of its tensors, which also goes into the header.

    The header comes first and the hash is known last: its place is kept, and filled in at the end.
    `tell` hears how many bytes were written.
    """
    header = _header(items, {**metadata, HASH: f"0x{'0' * 64}"})
    digest = hashlib.sha256()
    with path.open("r+b" if path.exists() else "wb") as file:
        file.write(header)
        for item in items:
            written = 0
            for chunk in item.chunks():
                file.write(chunk)
                digest.update(chunk)
                written += len(chunk)
                tell(len(chunk))
            assert written == item.bytes, f"{item.key}: {written} bytes, {item.bytes} announced"
        file.seek(header.index(b"0x" + b"0" * 64) + 2)
        file.write(digest.hexdigest().encode())
    flush(path)
    return digest.hexdigest()


def copy_bytes(file: Path, start: int, end: int) -> Iterable[bytes]:
    """Yield part of a file, some megabytes at a time."""
    with file.open("rb") as opened:
        opened.seek(start)
        while start < end:
            chunk = opened.read(min(CHUNK, end - start))
            if not chunk:
                raise OSError(5, f"{file} ended early")
            start += len(chunk)
            yield chunk


def _header(items: Sequence[Item], metadata: Mapping[str, str]) -> bytes:
    ends = list(accumulate(item.bytes for item in items))
    infos = {
        item.key: TensorInfo(item.dtype, tuple(item.shape), (end - item.bytes, end))
        for item, end in zip(items, ends, strict=True)
    }
    return header_bytes(metadata, infos)
