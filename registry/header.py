"""Read and check a safetensors header, and the facts of an identity in it, without torch.

A safetensors file is 8 bytes of header length, a JSON header, then the bytes of the tensors. An
identity's header says all there is to know about it but its numbers, so that a list of a
thousand reads nothing else. What is checked here is checked before any tensor is made.

Letters: L targets, r rank, a numbers of the down side, b of the up side.
"""

from __future__ import annotations

import json
import math
import re
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from registry.errors import RegistryError

MAX_FILE = 16 * 2**20  # an identity has 120 KB; the room is for higher ranks
MAX_HEADER = 2**20  # of an identity
FORMAT_HEADER = 100_000_000  # of any file: what safetensors itself takes; trainers write a lot
WORD = 200  # characters of a short text, such as a line of the lineage
COUNT = re.compile("[0-9]{1,18}")
SHA256 = re.compile("[0-9a-f]{64}")
KIND = "identity"
VERSION = 1

# Bytes of one number, by safetensors name.
DTYPE_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1}
DTYPE_BYTES |= {"U64": 8, "U32": 4, "U16": 2, "U8": 1, "BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1}

# dtype of an identity -> its tensors and theirs.
LAYOUTS = {
    "fp32": {"down": "F32", "up": "F32"},
    "fp16": {"down": "F16", "up": "F16"},
    "int8": {"down": "I8", "up": "I8", "down_scale": "F16", "up_scale": "F16"},
}


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


@dataclass(frozen=True)
class Facts:
    """What the header of an identity says; `hdbcli.identity` adds the numbers."""

    base: str
    family: str
    base_digest: str
    targets_digest: str
    scheme: str
    seed: int
    basis_digest: str
    probes: tuple[float, ...]
    targets: int  # L
    a: int
    b: int
    rank: int
    dtype: str
    identifier: str
    steps: int
    optimizer: str
    hypernetwork: str
    created: str
    lineage: tuple[str, ...]
    likeness: float | None

    @property
    def numbers(self) -> int:
        """Count the trained numbers."""
        return self.targets * self.rank * (self.a + self.b)


def read_header(path: Path, max_bytes: int = MAX_FILE) -> Header:
    """Read and check the header of a safetensors file; raise RegistryError for any flaw."""
    try:
        state = path.stat()
        if not stat.S_ISREG(state.st_mode):  # opening a pipe would wait for ever
            raise RegistryError(f"{path} is not a file")
        if state.st_size > max_bytes:
            raise RegistryError(f"{path} has {state.st_size} bytes; at most {max_bytes} are read")
        with path.open("rb") as file:
            first = file.read(9)
            most = MAX_HEADER if max_bytes <= MAX_FILE else FORMAT_HEADER
            length = _header_length(path, first, state.st_size, most)
            text = first[8:] + file.read(length - 1)
    except (FileNotFoundError, ValueError) as error:  # ValueError: a NUL in the path
        raise RegistryError(f"no such file: {str(path)!r}") from error
    except OSError as error:
        raise RegistryError(f"cannot read {path}: {error.strerror or error}") from error
    try:
        metadata, tensors = _parse(text, state.st_size - 8 - length)
    except RecursionError as error:
        raise _damaged(path, "its header is nested too deeply") from error
    except ValueError as error:
        raise _damaged(path, str(error)) from error
    return Header(metadata, tensors, state.st_size, 8 + length)


def read_facts(path: Path, header: Header) -> Facts:
    """Return what an identity's header says; raise RegistryError naming the file."""
    try:
        return parse_facts(header.metadata, header.tensors)
    except RegistryError as error:
        raise RegistryError(f"{path}: {error}") from error


def read_content(path: Path, header: Header) -> bytes:
    """Read an identity's tensor bytes; raise RegistryError unless its content digest agrees."""
    try:
        with path.open("rb") as file:
            file.seek(header.start)
            content = file.read(MAX_FILE)
    except OSError as error:
        raise RegistryError(f"cannot read {path}: {error.strerror or error}") from error
    if content_digest(header.metadata, header.tensors, content) != header.metadata.get(
        "hdb.content"
    ):
        raise RegistryError(
            f"{path}: the content digest does not agree: the file was edited by hand or damaged; "
            "restore it from a copy or make it again with hdb new"
        )
    return content


def content_digest(
    metadata: Mapping[str, str], tensors: Mapping[str, TensorInfo], content: bytes
) -> str:
    """Return the sha256 of tensor bytes, tensor layout and metadata but `hdb.content`, in hex."""
    import hashlib  # loads OpenSSL, which a list never needs

    layout = {name: [t.dtype, t.shape, t.offsets] for name, t in tensors.items()}
    words = {key: value for key, value in metadata.items() if key != "hdb.content"}
    head = json.dumps([words, layout], sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(head.encode() + b"\n" + content).hexdigest()


def parse_facts(metadata: Mapping[str, str], tensors: Mapping[str, TensorInfo]) -> Facts:
    """Check an identity's metadata against its tensors; raise RegistryError without a path."""
    if metadata.get("hdb.kind") != KIND:
        raise RegistryError("a safetensors file, but not an identity of hdb; make one with hdb new")
    version = _count(metadata, "hdb.version", 1)
    if version > VERSION:
        raise RegistryError(
            f"made by a newer hdb (format {version}, this one reads {VERSION}); upgrade hdb"
        )
    if not SHA256.fullmatch(metadata.get("hdb.content", "")):
        raise RegistryError("hdb.content is missing or not a sha256; the file is damaged")
    facts = Facts(
        base=_text(metadata, "hdb.base"),
        family=_text(metadata, "hdb.family"),
        base_digest=_text(metadata, "hdb.base_digest"),
        targets_digest=_text(metadata, "hdb.targets_digest"),
        scheme=_text(metadata, "hdb.basis_scheme"),
        seed=_count(metadata, "hdb.basis_seed", 0),
        basis_digest=_text(metadata, "hdb.basis_digest"),
        probes=tuple(_finite("hdb.basis_probes", v) for v in _array(metadata, "hdb.basis_probes")),
        targets=_count(metadata, "hdb.targets", 1),
        a=_count(metadata, "hdb.a", 1),
        b=_count(metadata, "hdb.b", 1),
        rank=_count(metadata, "hdb.rank", 1),
        dtype=_text(metadata, "hdb.dtype"),
        identifier=_text(metadata, "hdb.identifier"),
        steps=_count(metadata, "hdb.steps", 0),
        optimizer=_text(metadata, "hdb.optimizer", low=0),
        hypernetwork=_text(metadata, "hdb.hypernetwork", low=0),
        created=_time(metadata, "hdb.created"),
        lineage=tuple(_word("hdb.lineage", v) for v in _array(metadata, "hdb.lineage")),
        likeness=_number(metadata, "hdb.likeness"),
    )
    _check_tensors(facts, tensors)
    return facts


def _check_tensors(facts: Facts, tensors: Mapping[str, TensorInfo]) -> None:
    """Raise RegistryError unless names, dtypes and shapes are those that the metadata promise."""
    if facts.dtype not in LAYOUTS:
        raise RegistryError(f"unknown dtype {facts.dtype!r}; one of {', '.join(LAYOUTS)} is read")
    if facts.rank > facts.b:
        raise RegistryError(f"rank {facts.rank} is above b {facts.b}; such an identity is refused")
    wanted = LAYOUTS[facts.dtype]
    if set(tensors) != set(wanted):
        raise RegistryError(
            f"tensors {sorted(tensors)!r} are not the {sorted(wanted)!r} of a {facts.dtype} "
            "identity; the file is damaged"
        )
    count, rank = facts.targets, facts.rank
    shapes = {"down": (count, rank, facts.a), "up": (count, facts.b, rank)}
    for name, dtype in wanted.items():
        shape = shapes.get(name, (count, rank))  # a scale for each target and rank
        info = tensors[name]
        if (info.dtype, info.shape) != (dtype, shape):
            raise RegistryError(
                f"tensor {name} is {info.dtype} {info.shape}, the metadata say {dtype} {shape}; "
                "the file is damaged"
            )


def _header_length(path: Path, first: bytes, size: int, most: int) -> int:
    """Return the header's length from a file's first 9 bytes; say what else the file may be."""
    length = int.from_bytes(first[:8], "little")
    if first[8:9] == b"{" and length <= most:
        if 8 + length > size:
            raise _damaged(path, f"{size} bytes, but the header alone has {length}: truncated")
        return length
    # A header of 640 bytes starts like a pickle, so magic bytes count only for what is no header.
    if first[:2] == b"PK" or (first[:1] == b"\x80" and first[1:2] in b"\x01\x02\x03\x04\x05"):
        raise RegistryError(
            f"{path} is a pickle or zip checkpoint, which can run code when it is opened; "
            "hdb reads safetensors only"
        )
    if first[8:9] == b"{":
        raise RegistryError(
            f"{path}: a header of {length} bytes is refused (at most {most}); it is damaged, or no "
            "such file"
        )
    raise RegistryError(f"{path} is not a safetensors file; give one that hdb made")


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


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Make a dict of JSON pairs; raise ValueError where a key comes twice, as readers differ."""
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key of its header comes twice")
    return found


DECODER = json.JSONDecoder(object_pairs_hook=_unique)  # one for all: a list reads thousands


def _damaged(path: Path, reason: str) -> RegistryError:
    """Make the error of a file that began as safetensors but does not hold."""
    return RegistryError(f"{path} is damaged: {reason}; restore it from a copy or make it again")


def _word(key: str, value: Any, low: int = 1) -> str:
    """Check a short text that may be printed on a terminal: no escapes, no line ends."""
    if type(value) is not str or not low <= len(value) <= WORD or not value.isprintable():
        raise RegistryError(f"metadata {key} is {str(value)[:40]!r}; the file is damaged")
    return value


def _text(metadata: Mapping[str, str], key: str, low: int = 1) -> str:
    return _word(key, metadata.get(key), low)


def _count(metadata: Mapping[str, str], key: str, low: int) -> int:
    text = metadata.get(key, "")
    if not COUNT.fullmatch(text) or int(text) < low:
        raise RegistryError(f"metadata {key} is {text[:40]!r}, not a number from {low}")
    return int(text)


def _finite(key: str, value: Any) -> float:
    if type(value) not in (int, float) or not abs(value) < 1e30:
        raise RegistryError(f"metadata {key} holds {str(value)[:40]!r}, not a finite number")
    return float(value)


def _json(metadata: Mapping[str, str], key: str) -> Any:
    try:
        return json.loads(metadata.get(key, ""))
    except (ValueError, RecursionError) as error:
        raise RegistryError(f"metadata {key} cannot be read; the file is damaged") from error


def _array(metadata: Mapping[str, str], key: str) -> list[Any]:
    value = _json(metadata, key)
    if type(value) is not list:
        raise RegistryError(f"metadata {key} is not a list; the file is damaged")
    return value


def _number(metadata: Mapping[str, str], key: str) -> float | None:
    value = _json(metadata, key)
    return None if value is None else _finite(key, value)


def _time(metadata: Mapping[str, str], key: str) -> str:
    text = _text(metadata, key)
    try:
        moment = datetime.fromisoformat(re.sub("Z$", "+00:00", text))  # Python 3.10 reads no Z
    except ValueError as error:
        raise RegistryError(f"metadata {key} is {text[:40]!r}, not an ISO 8601 time") from error
    if moment.utcoffset() != timedelta(0):
        raise RegistryError(f"metadata {key} is {text[:40]!r}, not a time in UTC")
    return text
