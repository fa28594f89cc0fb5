"""The facts of an identity: what the header of its file says, checked, without torch.

An identity's header says all there is to know about it but its numbers, so that a list of a
thousand reads nothing else. What is checked here is checked before any tensor is made.

Letters: L targets, r rank, a numbers of the down side, b of the up side.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, TypeVar

from registry.checkpoints.safetensors import MAX_FILE, SHA256, Header, TensorInfo
from registry.errors import HdbError
from registry.files import reading

T = TypeVar("T")

WORD = 200  # characters of a short text, such as a line of the lineage
COUNT = re.compile("[0-9]{1,18}")
KIND = "identity"
VERSION = 1
# dtype of an identity -> its tensors and theirs.
LAYOUTS = {
    "fp32": {"down": "F32", "up": "F32"},
    "fp16": {"down": "F16", "up": "F16"},
    "int8": {"down": "I8", "up": "I8", "down_scale": "F16", "up_scale": "F16"},
}


@dataclass(frozen=True)
class Facts:
    """What an identity says of itself besides its numbers: its base, its basis, how it was made."""

    base: str
    family: str
    base_digest: str
    targets_digest: str
    scheme: str
    seed: int
    basis_digest: str
    probes: tuple[float, ...]
    identifier: str
    created: str  # ISO 8601, UTC
    steps: int = 0
    optimizer: str = ""
    hypernetwork: str = ""  # its digest, "" where none was used
    lineage: tuple[str, ...] = ()
    likeness: float | None = None


@dataclass(frozen=True)
class Layout:
    """What the header says of the numbers."""

    targets: int  # L
    a: int
    b: int
    rank: int
    dtype: str

    @property
    def numbers(self) -> int:
        """Count the trained numbers."""
        return self.targets * self.rank * (self.a + self.b)


def read_facts(path: Path, header: Header) -> tuple[Facts, Layout]:
    """Return what an identity's header says; raise HdbError naming the file."""
    try:
        return parse_facts(header.metadata, header.tensors)
    except HdbError as error:
        raise HdbError(f"{path}: {error}") from error


def read_content(path: Path, header: Header) -> bytes:
    """Read an identity's tensor bytes; raise HdbError unless its content digest agrees."""
    with reading(path), path.open("rb") as file:
        file.seek(header.start)
        content = file.read(MAX_FILE)
    digest = content_digest(header.metadata, header.tensors, content)
    if digest != header.metadata.get("hdb.content"):
        raise HdbError(
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


def parse_facts(
    metadata: Mapping[str, str], tensors: Mapping[str, TensorInfo]
) -> tuple[Facts, Layout]:
    """Check an identity's metadata against its tensors; raise HdbError without a path."""
    if metadata.get("hdb.kind") != KIND:
        raise HdbError("a safetensors file, but not an identity of hdb; make one with hdb new")
    version = _count(metadata, "hdb.version", 1)
    if version > VERSION:
        raise HdbError(
            f"made by a newer hdb (format {version}, this one reads {VERSION}); upgrade hdb"
        )
    if not SHA256.fullmatch(metadata.get("hdb.content", "")):
        raise HdbError("hdb.content is missing or not a sha256; the file is damaged")
    values = {name: read(metadata, key) for name, (key, read, _) in _FIELDS.items()}
    layout = _made(Layout, {name: values.pop(name) for name in Layout.__dataclass_fields__})
    _check_tensors(layout, tensors)
    return _made(Facts, values), layout


def _made(kind: type[T], values: dict[str, Any]) -> T:
    """Make a frozen dataclass of a value for each of its fields, past its `__init__`: that sets
    them one by one, which a list of thousands feels."""
    made = object.__new__(kind)
    vars(made).update(values)
    return made


def metadata_of(facts: Facts, layout: Layout) -> dict[str, str]:
    """Return the metadata but the digest; every value a string, as the format asks."""
    if facts.likeness is not None and not math.isfinite(facts.likeness):
        raise HdbError(f"the likeness {facts.likeness} is not a number; nothing was written")
    values = vars(facts) | vars(layout)
    known = {key: write(values[name]) for name, (key, _, write) in _FIELDS.items()}
    return {"format": "pt", "hdb.kind": KIND, "hdb.version": str(VERSION), **known}


def _check_tensors(layout: Layout, tensors: Mapping[str, TensorInfo]) -> None:
    """Raise HdbError unless names, dtypes and shapes are those that the metadata promise."""
    if layout.dtype not in LAYOUTS:
        raise HdbError(f"unknown dtype {layout.dtype!r}; one of {', '.join(LAYOUTS)} is read")
    if layout.rank > layout.b:
        raise HdbError(f"rank {layout.rank} is above b {layout.b}; such an identity is refused")
    wanted = LAYOUTS[layout.dtype]
    if set(tensors) != set(wanted):
        raise HdbError(
            f"tensors {sorted(tensors)!r} are not the {sorted(wanted)!r} of a {layout.dtype} "
            "identity; the file is damaged"
        )
    count, rank = layout.targets, layout.rank
    shapes = {"down": (count, rank, layout.a), "up": (count, layout.b, rank)}
    for name, dtype in wanted.items():
        shape = shapes.get(name, (count, rank))  # a scale for each target and rank
        info = tensors[name]
        if (info.dtype, info.shape) != (dtype, shape):
            raise HdbError(
                f"tensor {name} is {info.dtype} {info.shape}, the metadata say {dtype} {shape}; "
                "the file is damaged"
            )


def _word(key: str, value: Any, low: int = 1) -> str:
    """Check a short text that may be printed on a terminal: no escapes, no line ends."""
    if type(value) is not str or not low <= len(value) <= WORD or not value.isprintable():
        raise HdbError(f"metadata {key} is {str(value)[:40]!r}; the file is damaged")
    return value


def _text(metadata: Mapping[str, str], key: str, low: int = 1) -> str:
    return _word(key, metadata.get(key), low)


def _count(metadata: Mapping[str, str], key: str, low: int = 1) -> int:
    text = metadata.get(key, "")
    if not COUNT.fullmatch(text) or int(text) < low:
        raise HdbError(f"metadata {key} is {text[:40]!r}, not a number from {low}")
    return int(text)


def _finite(key: str, value: Any) -> float:
    if type(value) not in (int, float) or not abs(value) < 1e30:
        raise HdbError(f"metadata {key} holds {str(value)[:40]!r}, not a finite number")
    return float(value)


def _json(metadata: Mapping[str, str], key: str) -> Any:
    try:
        return json.loads(metadata.get(key, ""))
    except (ValueError, RecursionError) as error:
        raise HdbError(f"metadata {key} cannot be read; the file is damaged") from error


@lru_cache(256)  # the identities of a base have the same probes
def _array(check: Callable[[str, Any], T], key: str, text: str) -> tuple[T, ...]:
    value = _json({key: text}, key)
    if type(value) is not list:
        raise HdbError(f"metadata {key} is not a list; the file is damaged")
    return tuple(check(key, each) for each in value)


def _probes(metadata: Mapping[str, str], key: str) -> tuple[float, ...]:
    return _array(_finite, key, metadata.get(key, ""))


def _lines(metadata: Mapping[str, str], key: str) -> tuple[str, ...]:
    return _array(_word, key, metadata.get(key, ""))


def _number(metadata: Mapping[str, str], key: str) -> float | None:
    value = _json(metadata, key)
    return None if value is None else _finite(key, value)


def _time(metadata: Mapping[str, str], key: str) -> str:
    text = _text(metadata, key)
    try:
        whole = f"{text[:-1]}+00:00" if text.endswith("Z") else text  # Python 3.10 reads no Z
        moment = datetime.fromisoformat(whole)
    except ValueError as error:
        raise HdbError(f"metadata {key} is {text[:40]!r}, not an ISO 8601 time") from error
    if moment.utcoffset() != timedelta(0):
        raise HdbError(f"metadata {key} is {text[:40]!r}, not a time in UTC")
    return text


# Field -> its key in the metadata, how its text is read and checked, and how it is written.
_FIELDS: dict[str, tuple[str, Callable[[Mapping[str, str], str], Any], Callable[[Any], str]]] = {
    "base": ("hdb.base", _text, str),
    "family": ("hdb.family", _text, str),
    "base_digest": ("hdb.base_digest", _text, str),
    "targets_digest": ("hdb.targets_digest", _text, str),
    "scheme": ("hdb.basis_scheme", _text, str),
    "seed": ("hdb.basis_seed", partial(_count, low=0), str),
    "basis_digest": ("hdb.basis_digest", _text, str),
    # Nine digits bring any float32 back exactly.
    "probes": (
        "hdb.basis_probes",
        _probes,
        lambda probes: json.dumps([float(f"{probe:.9g}") for probe in probes]),
    ),
    "targets": ("hdb.targets", _count, str),
    "a": ("hdb.a", _count, str),
    "b": ("hdb.b", _count, str),
    "rank": ("hdb.rank", _count, str),
    "dtype": ("hdb.dtype", _text, str),
    "identifier": ("hdb.identifier", _text, str),
    "steps": ("hdb.steps", partial(_count, low=0), str),
    "optimizer": ("hdb.optimizer", partial(_text, low=0), str),
    "hypernetwork": ("hdb.hypernetwork", partial(_text, low=0), str),
    "created": ("hdb.created", _time, str),
    "lineage": ("hdb.lineage", _lines, lambda lines: json.dumps(list(lines))),
    "likeness": (
        "hdb.likeness",
        _number,
        lambda likeness: json.dumps(None if likeness is None else round(float(likeness), 6)),
    ),
}

# What `_made` takes for granted: it calls no `__post_init__`, and sets what is in the table alone.
assert not any(hasattr(kind, "__post_init__") for kind in (Facts, Layout))
assert _FIELDS.keys() == Facts.__dataclass_fields__.keys() | Layout.__dataclass_fields__.keys()
