"""The facts of an identity: what the header of its file says, checked, without torch.

An identity's header says all there is to know about it but its numbers, so that a list of a
thousand reads nothing else. What is checked here is checked before any tensor is made.

Letters: L targets, r rank, a numbers of the down side, b of the up side.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from registry.checkpoints.safetensors import MAX_FILE, SHA256, Header, TensorInfo
from registry.errors import HdbError

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
    """What the header of an identity says; `hdbcli.identity.file` adds the numbers."""

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


def read_facts(path: Path, header: Header) -> Facts:
    """Return what an identity's header says; raise HdbError naming the file."""
    try:
        return parse_facts(header.metadata, header.tensors)
    except HdbError as error:
        raise HdbError(f"{path}: {error}") from error


def read_content(path: Path, header: Header) -> bytes:
    """Read an identity's tensor bytes; raise HdbError unless its content digest agrees."""
    try:
        with path.open("rb") as file:
            file.seek(header.start)
            content = file.read(MAX_FILE)
    except OSError as error:
        raise HdbError(f"cannot read {path}: {error.strerror or error}") from error
    if content_digest(header.metadata, header.tensors, content) != header.metadata.get(
        "hdb.content"
    ):
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


def parse_facts(metadata: Mapping[str, str], tensors: Mapping[str, TensorInfo]) -> Facts:
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
    """Raise HdbError unless names, dtypes and shapes are those that the metadata promise."""
    if facts.dtype not in LAYOUTS:
        raise HdbError(f"unknown dtype {facts.dtype!r}; one of {', '.join(LAYOUTS)} is read")
    if facts.rank > facts.b:
        raise HdbError(f"rank {facts.rank} is above b {facts.b}; such an identity is refused")
    wanted = LAYOUTS[facts.dtype]
    if set(tensors) != set(wanted):
        raise HdbError(
            f"tensors {sorted(tensors)!r} are not the {sorted(wanted)!r} of a {facts.dtype} "
            "identity; the file is damaged"
        )
    count, rank = facts.targets, facts.rank
    shapes = {"down": (count, rank, facts.a), "up": (count, facts.b, rank)}
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


def _count(metadata: Mapping[str, str], key: str, low: int) -> int:
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


def _array(metadata: Mapping[str, str], key: str) -> list[Any]:
    value = _json(metadata, key)
    if type(value) is not list:
        raise HdbError(f"metadata {key} is not a list; the file is damaged")
    return value


def _number(metadata: Mapping[str, str], key: str) -> float | None:
    value = _json(metadata, key)
    return None if value is None else _finite(key, value)


def _time(metadata: Mapping[str, str], key: str) -> str:
    text = _text(metadata, key)
    try:
        moment = datetime.fromisoformat(re.sub("Z$", "+00:00", text))  # Python 3.10 reads no Z
    except ValueError as error:
        raise HdbError(f"metadata {key} is {text[:40]!r}, not an ISO 8601 time") from error
    if moment.utcoffset() != timedelta(0):
        raise HdbError(f"metadata {key} is {text[:40]!r}, not a time in UTC")
    return text
