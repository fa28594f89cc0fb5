"""Safetensors files: check a header, read tensors one by one, write a file at once or bit by bit.

A safetensors file is 8 bytes of header length, a JSON header, then the bytes of the tensors. What
a header says is checked before any tensor is made, and without torch. Tensors are read when they
are asked for: a file that is opened as a whole would lie in memory beside the model.
"""

from __future__ import annotations

import json
import math
import re
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from registry.errors import HdbError
from registry.files import REFUSALS, flush, reading

if TYPE_CHECKING:
    import torch
    from torch import Tensor

MAX_FILE = 16 * 2**20  # an identity has 120 KB; the room is for higher ranks
MAX_HEADER = 2**20  # of an identity
FORMAT_HEADER = 100_000_000  # of any file: what safetensors itself takes; trainers write a lot
FIRST = 2**12  # bytes read at once, more than the header of an identity has
LARGEST = 2**40  # bytes of any other file, of which the header alone is read as a whole
CHUNK = 2**23  # bytes copied at a time
SHA256 = re.compile("[0-9a-f]{64}")
HASH = "modelspec.hash_sha256"

ENTRY = {"dtype", "shape", "data_offsets"}  # what a header says of each tensor
# The numbers of a tensor, by safetensors name: their bytes, and what torch calls them.
DTYPE_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1}
DTYPE_BYTES |= {"U64": 8, "U32": 4, "U16": 2, "U8": 1, "BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1}
FLOATS = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
NUMBERS = FLOATS | {"I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8", "BOOL": "bool"}
NUMBERS |= {"U64": "uint64", "U32": "uint32", "U16": "uint16", "U8": "uint8"}
NUMBERS |= {"F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2"}


@dataclass(frozen=True)
class TensorInfo:
    """Where one tensor lies; offsets count from the end of the header."""

    dtype: str
    shape: tuple[int, ...]
    offsets: tuple[int, int]


@dataclass(frozen=True)
class Header:
    """A checked header: offsets are in order, without gap or overlap, and fill the file."""

    path: Path
    metadata: dict[str, str]
    tensors: dict[str, TensorInfo]
    bytes: int  # of the whole file
    start: int  # where the tensor bytes begin

    def tensor(self, name: str) -> Tensor:
        """Read one tensor; HdbError if that does not work, as where the file became shorter."""
        info = self.tensors[name]
        start, end = info.offsets
        content = bytearray(end - start)
        with reading(self.path), self.path.open("rb") as file:
            file.seek(self.start + start)
            read = file.readinto(content)
        if read != len(content):
            raise HdbError(f"{self.path} became shorter while it was read; try again")
        try:
            return tensor_of(content, info)
        except (RuntimeError, TypeError) as error:  # no numbers, and more rows than can be counted
            raise _damaged(self.path, f"tensor {name!r} of {info.shape}") from error


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


def chunks_of(header: Header, name: str) -> Iterator[bytes]:
    """Yield the bytes of one tensor, some megabytes at a time."""
    start, end = header.tensors[name].offsets
    with header.path.open("rb") as file:
        file.seek(header.start + start)
        while start < end:
            chunk = file.read(min(CHUNK, end - start))
            if not chunk:
                raise OSError(5, f"{header.path} ended early")
            start += len(chunk)
            yield chunk


def dtype_of(name: str) -> torch.dtype:
    """Return torch's dtype of a safetensors name."""
    import torch

    return getattr(torch, NUMBERS[name])


def tensor_of(content: bytearray, info: TensorInfo) -> Tensor:
    """View bytes as the tensor they are."""
    import torch

    dtype = dtype_of(info.dtype)
    if not content:  # which torch takes no view of
        return torch.empty(info.shape, dtype=dtype)
    return torch.frombuffer(content, dtype=torch.uint8).view(dtype).view(info.shape)


def read_tensors(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Return the metadata and all tensors of a file; raise HdbError for any flaw."""
    header = read_header(path, LARGEST)
    return header.metadata, {name: header.tensor(name) for name in header.tensors}


def read_floats(
    files: Sequence[Path],
    prefix: str,
    dtype: torch.dtype,
    renamed: Callable[[Iterable[str]], Mapping[str, str]] | None = None,
) -> dict[str, Tensor]:
    """Return the tensors whose names start with `prefix`, as `dtype`; HdbError for what is
    no float.

    `renamed` gives each tensor of a file the name that counts; position ids, of which old files
    hold a row and new ones make it, are left out.
    """
    found = {}
    for path in files:
        header = read_header(path, LARGEST)
        names = renamed(header.tensors) if renamed else {}
        for stored, info in header.tensors.items():
            name = names.get(stored, stored)
            if not name.startswith(prefix) or name.endswith(".position_ids"):
                continue
            if info.dtype not in FLOATS:
                raise HdbError(
                    f"{path}: {name} is {info.dtype}, no float; give the model in F16 or F32"
                )
            found[name] = header.tensor(stored).to(dtype)
    return found


def save_tensors(
    tensors: Mapping[str, Tensor], path: Path, metadata: dict[str, str] | None = None
) -> None:
    """Write contiguous tensors by name, the same ones as the same bytes; OSError where that does
    not work.

    The library's own writer leaves a file that only its owner can read, has an error of its own for
    a full disk, and shuffles the metadata, so that a file's hash would say nothing.
    """
    from safetensors.torch import save

    content = memoryview(save(dict(tensors)))
    start = 8 + int.from_bytes(content[:8], "little")
    _, infos = _parse(bytes(content[8:start]), len(content) - start)
    with path.open("wb") as file:
        file.write(header_bytes(metadata or {}, infos))
        file.write(content[start:])


def write_tensors(
    path: Path, items: Sequence[Item], metadata: Mapping[str, str], tell: Callable[[int], None]
) -> str:
    """Write a file tensor by tensor, so that memory holds one of them at a time; return the sha256
    of its tensors, which also goes into the header.

    The header comes first and the hash is known last: its place is kept, and filled in at the end.
    Where a file system writes from front to back alone, as those of object stores do, all is
    written a second time. `tell` hears how many bytes were written.
    """
    import hashlib  # loads OpenSSL, which a list never needs

    infos = laid_out((item.key, item.dtype, tuple(item.shape)) for item in items)
    digest, unknown = hashlib.sha256(), "0" * 64
    header = header_bytes({**metadata, HASH: f"0x{unknown}"}, infos)
    with path.open("wb") as file:
        file.write(header)
        for item in items:
            written = 0
            for chunk in item.chunks():
                file.write(chunk)
                digest.update(chunk)
                written += len(chunk)
                tell(len(chunk))
            assert written == item.bytes, f"{item.key}: {written} bytes, {item.bytes} announced"
    place, found = header.index(f"0x{unknown}".encode()) + 2, digest.hexdigest().encode()
    try:
        with path.open("rb+") as file:
            file.seek(place)
            file.write(found)
    except OSError as error:
        if error.errno not in REFUSALS:
            raise
        with path.open("wb") as file:
            file.write(header[:place] + found + header[place + len(found) :])
            for item in items:
                file.writelines(item.chunks())
    flush(path)
    return found.decode()


def laid_out(tensors: Iterable[tuple[str, str, tuple[int, ...]]]) -> dict[str, TensorInfo]:
    """Lay tensors of these names, dtypes and shapes one behind the other."""
    infos, end = {}, 0
    for name, dtype, shape in tensors:
        start, end = end, end + DTYPE_BYTES[dtype] * math.prod(shape)
        infos[name] = TensorInfo(dtype, shape, (start, end))
    return infos


def read_header(path: Path, max_bytes: int = MAX_FILE) -> Header:
    """Read and check the header of a safetensors file; raise HdbError for any flaw."""
    try:
        state = path.stat()
        if not stat.S_ISREG(state.st_mode):  # opening a pipe would wait for ever
            raise HdbError(f"{path} is not a file")
        if state.st_size > max_bytes:
            raise HdbError(f"{path} has {state.st_size} bytes; at most {max_bytes} are read")
        with path.open("rb", buffering=0) as file:
            first = file.read(FIRST)
            most = MAX_HEADER if max_bytes <= MAX_FILE else FORMAT_HEADER
            length = _header_length(path, first, state.st_size, most)
            text = first[8 : 8 + length]
            while len(text) < length and (more := file.read(length - len(text))):
                text += more
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
    return Header(path, metadata, tensors, state.st_size, 8 + length)


def _header_length(path: Path, first: bytes, size: int, most: int) -> int:
    """Return the header's length from a file's first bytes; say what else the file may be."""
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
    if type(value) is not dict or value.keys() != ENTRY:
        raise ValueError(f"tensor {name!r} lacks dtype, shape or data_offsets, or has more")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if type(dtype) is not str or dtype not in DTYPE_BYTES:
        raise ValueError(f"tensor {name!r} has an unknown dtype {str(dtype)[:20]!r}")
    if type(shape) is not list or type(offsets) is not list:
        raise ValueError(f"tensor {name!r} has a shape or offsets that are no lists")
    for n in (*shape, *offsets):  # a loop, since lists of identities check thousands of them
        if type(n) is not int or n < 0:
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
