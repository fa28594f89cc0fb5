"""Read, check and write a safetensors header, without torch.

A safetensors file is 8 bytes of header length, a JSON header, then the bytes of the tensors. What
is checked here is checked before any tensor is made.
"""

from __future__ import annotations

import json
import math
import re
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from registry.errors import HdbError

MAX_FILE = 16 * 2**20  # an identity has 120 KB; the room is for higher ranks
MAX_HEADER = 2**20  # of an identity
FORMAT_HEADER = 100_000_000  # of any file: what safetensors itself takes; trainers write a lot
SHA256 = re.compile("[0-9a-f]{64}")

# Bytes of one number, by safetensors name.
DTYPE_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1}
DTYPE_BYTES |= {"U64": 8, "U32": 4, "U16": 2, "U8": 1, "BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1}


@dataclass(frozen=True)
class TensorInfo:
    """Where one tensor lies; offsets count from the end of the header."""

    dtype: str
    shape: tuple[int, ...]
    offsets: tuple[int, int]


@dataclass(frozen=True)
class Header:
    """A checked header: offsets are in order, without gap or overlap, and fill the file."""

    metadata: dict[str, str]
    tensors: dict[str, TensorInfo]
    bytes: int  # of the whole file
    start: int  # where the tensor bytes begin


def read_header(path: Path, max_bytes: int = MAX_FILE) -> Header:
    """Read and check the header of a safetensors file; raise HdbError for any flaw."""
    try:
        state = path.stat()
        if not stat.S_ISREG(state.st_mode):  # opening a pipe would wait for ever
            raise HdbError(f"{path} is not a file")
        if state.st_size > max_bytes:
            raise HdbError(f"{path} has {state.st_size} bytes; at most {max_bytes} are read")
        with path.open("rb") as file:
            first = file.read(9)
            most = MAX_HEADER if max_bytes <= MAX_FILE else FORMAT_HEADER
            length = _header_length(path, first, state.st_size, most)
            text = first[8:] + file.read(length - 1)
    except (FileNotFoundError, ValueError) as error:  # ValueError: a NUL in the path
        raise HdbError(f"no such file: {str(path)!r}") from error
    except OSError as error:
        raise HdbError(f"cannot read {path}: {error.strerror or error}") from error
    try:
        metadata, tensors = _parse(text, state.st_size - 8 - length)
    except RecursionError as error:
        raise _damaged(path, "its header is nested too deeply") from error
    except ValueError as error:
        raise _damaged(path, str(error)) from error
    return Header(metadata, tensors, state.st_size, 8 + length)


def _header_length(path: Path, first: bytes, size: int, most: int) -> int:
    """Return the header's length from a file's first 9 bytes; say what else the file may be."""
    length = int.from_bytes(first[:8], "little")
    if first[8:9] == b"{" and length <= most:
        if 8 + length > size:
            raise _damaged(path, f"{size} bytes, but the header alone has {length}: truncated")
        return length
    # A header of 640 bytes starts like a pickle, so magic bytes count only without a header.
    if first[:2] == b"PK" or (first[:1] == b"\x80" and first[1:2] in b"\x01\x02\x03\x04\x05"):
        raise HdbError(
            f"{path} is a pickle or zip checkpoint, which can run code when it is opened; "
            "hdb reads safetensors only"
        )
    if first[8:9] == b"{":
        raise HdbError(
            f"{path}: a header of {length} bytes is refused (at most {most}); it is damaged, or no "
            "such file"
        )
    raise HdbError(f"{path} is not a safetensors file; give one that hdb made")


def _parse(text: bytes, room: int) -> tuple[dict[str, str], dict[str, TensorInfo]]:
    """Return metadata and tensors; raise ValueError unless they fill `room` bytes exactly."""
    found = DECODER.decode(text.decode("utf-8"))  # UTF-8 only, as the format
    metadata = found.pop("__metadata__", {})
    if type(metadata) is not dict:
        raise ValueError("its metadata are not a table")
    for key, value in metadata.items():
        if type(value) is not str:
            raise ValueError(f"metadata {key!r} is not a string")
    # Half of a surrogate pair could not be printed.
    "".join([*found, *metadata, *metadata.values()]).encode("utf-8")
    tensors = {name: _tensor(name, value) for name, value in found.items()}
    end = 0
    for name, info in sorted(tensors.items(), key=lambda item: item[1].offsets):
        if info.offsets[0] != end:
            raise ValueError(f"tensor {name!r} starts at {info.offsets[0]}, not at {end}")
        end = info.offsets[1]
    if end > room:
        raise ValueError(f"truncated: {room} bytes of tensors, {end} are needed")
    if end < room:
        raise ValueError(f"{room - end} bytes too many after the last tensor")
    return metadata, tensors


def _tensor(name: str, value: Any) -> TensorInfo:
    """Check one tensor's entry; raise ValueError."""
    if type(value) is not dict or set(value) != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"tensor {name!r} lacks dtype, shape or data_offsets, or has more")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if type(dtype) is not str or dtype not in DTYPE_BYTES:
        raise ValueError(f"tensor {name!r} has an unknown dtype {str(dtype)[:20]!r}")
    for numbers in (shape, offsets):
        if type(numbers) is not list or any(type(n) is not int or n < 0 for n in numbers):
            raise ValueError(f"tensor {name!r} has a shape or offsets that are not whole numbers")
    if len(shape) > 8:
        raise ValueError(f"tensor {name!r} has {len(shape)} dimensions")
    if len(offsets) != 2 or offsets[1] - offsets[0] != math.prod(shape) * DTYPE_BYTES[dtype]:
        raise ValueError(f"tensor {name!r} has offsets that do not agree with its shape")
    return TensorInfo(dtype, tuple(shape), (offsets[0], offsets[1]))


def header_bytes(metadata: Mapping[str, str], tensors: Mapping[str, TensorInfo]) -> bytes:
    """Return the length and the JSON that begin a file, in this order of keys, which the library
    does not keep; padded, so that the tensors lie aligned."""
    table: dict[str, object] = {"__metadata__": dict(metadata)}
    for name, info in tensors.items():
        offsets = list(info.offsets)
        table[name] = {"dtype": info.dtype, "shape": list(info.shape), "data_offsets": offsets}
    text = json.dumps(table, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Make a dict of JSON pairs; raise ValueError where a key comes twice, as readers differ."""
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key of its header comes twice")
    return found


DECODER = json.JSONDecoder(object_pairs_hook=_unique)  # one for all: a list reads thousands


def _damaged(path: Path, reason: str) -> HdbError:
    """Make the error of a file that began as safetensors but does not hold."""
    return HdbError(f"{path} is damaged: {reason}; restore it from a copy or make it again")
