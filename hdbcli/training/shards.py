"""Prepare people for training once, and read them picture by picture from then on.

A folder of safetensors files, each with some whole people: crops, the recognisers' embeddings and
the base's latents, and in the header who they are and what was left out. `index.json` comes last:
without it the folder is not finished, and the same command goes on after the last whole file. Rows
are read from the files when they are asked for, so that memory does not depend on how many people
there are; they are read and not mapped, since a mapped file that is cut off meanwhile ends the
process without a word.

N pictures; S pixels of a crop's side; a latent is (c, h, w).
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, replace
from io import BufferedReader
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from hdbcli.config import Tell
from hdbcli.faces.recogniser import NUMBERS
from hdbcli.method.hypernet import TRAITS
from hdbcli.model.base import Base
from hdbcli.model.device import autocast
from hdbcli.training.people import (
    People,
    Persons,
    assemble,
    check_people,
    list_people,
    read_pictures,
    told,
)
from registry.checkpoints.safetensors import LARGEST, Header, read_header, save_tensors
from registry.errors import HdbError
from registry.files import reading, write_beside
from registry.orphans import WRITING, delete, temporaries
from registry.spec import BaseSpec

FORMAT = 2  # since traits are of two recognisers
KIND = "people"
INDEX, REPORT = "index.json", "report.txt"
FILE_BYTES = 2**27  # about how large a file becomes: what is lost when a run is cut off
OPEN = 64  # files held open
PROBED = 32  # numbers of a latent that tell one autoencoder from another
CLOSE = 0.1  # how far they may be off, in deviations: devices and number formats round
# Mean embeddings of two names, by dlib, below this distance are said to be one person: see
# docs/training.md.
ALIKE = 0.35
DTYPES = {"crops": ("U8", np.uint8), "traits": ("F32", np.float32), "latents": ("F16", np.float16)}


@dataclass(frozen=True)
class Prepared:
    """What preparing a folder came to."""

    people: int
    pictures: int
    files: int
    kept: int  # of the files, as an earlier run left them
    left_out: tuple[str, ...]  # a line for each picture and person, with the reason
    alike: tuple[tuple[str, str, float], ...]  # names that look like one person, and how far apart


class Part(NamedTuple):
    """The people of one file to be, and what it is made of: photos, base and settings."""

    file: Path
    persons: Persons
    made_of: str


def open_people(
    data: Path, base: Base, pattern: str, aligned: bool, cache: Path, tell: Tell
) -> People:
    """Open prepared people; prepare those of a plain folder in `cache` first.

    HdbError if they are not for this base, or if what `pattern` or `aligned` ask comes too late.
    """
    if not _files(data):
        prepare(data, base, cache, pattern, aligned, tell)
        return open_shards(cache, base)
    if pattern != "*" or aligned:
        raise HdbError(f"{data} is prepared already; drop --pattern and --aligned")
    return open_shards(data, base)


def prepare(
    data: Path,
    base: Base,
    out: Path,
    pattern: str,
    aligned: bool,
    tell: Tell,
    processes: int | None = None,
) -> Prepared:
    """Read, crop and encode all photos into `out`; a run that was cut off goes on.

    Files whose photos have not changed since are kept. HdbError if `out` was prepared for another
    base, if no person is left, or if it cannot be written.
    """
    if data.resolve() == out.resolve():
        raise HdbError(f"{out} is the folder of the photos; give another place with --out")
    persons, loose = list_people(data, pattern)
    facts = facts_of(base)
    parts = _parts(persons, out, base.spec, facts, aligned)
    headers = [_kept(part, base.spec.name, facts) for part in parts]
    missing = [part for part, header in zip(parts, headers, strict=True) if header is None]
    try:
        if missing:
            with suppress(FileNotFoundError):
                (out / INDEX).unlink()  # it would speak of files that are no more
        for orphan in temporaries(WRITING, out):
            delete(orphan)
        for old in _files(out):
            if old not in {part.file for part in parts}:
                old.unlink()  # of people who are not in the folder any more
    except OSError as error:
        raise HdbError(f"cannot write in {out}: {error.strerror or error}") from error
    files = [f for part in missing for photos in part.persons.values() for f in photos]
    most = max((sum(map(len, part.persons.values())) for part in missing), default=0)
    with closing(read_pictures(files, base.spec, aligned, processes, most)) as read:
        pictures = told(read, len(files), tell)
        for part in missing:
            people = encoded(base, assemble(part.persons, pictures, base.spec))
            _write(part, people, facts)
    listed = []
    for part in parts:
        header = _kept(part, base.spec.name, facts)
        if header is None:
            raise HdbError(f"{part.file} changed while it was prepared; run the command again")
        content = header.metadata["hdb.content"]
        listed.append({"file": part.file.name, "bytes": header.bytes, "content": content})
    index = {"kind": KIND, "format": FORMAT, "base": facts, "files": listed}
    found = _opened(out, index)
    left_out = (*loose, *found.skipped)
    total = sum(len(files) for part in parts for files in part.persons.values())
    check_people(data, total, len(found.names), left_out)
    alike = tuple(twins(found, tell))
    _report(out / REPORT, found, left_out, alike)
    with write_beside(out / INDEX) as beside:
        beside.write_text(json.dumps(index, indent=1))
    counts = len(found.names), len(found.crops), len(parts), len(parts) - len(missing)
    return Prepared(*counts, left_out, alike)


def _report(
    path: Path, people: People, left_out: Sequence[str], alike: Sequence[tuple[str, str, float]]
) -> None:
    """Write what became of the photos, a line each."""
    lines = [
        f"{len(people.names)} people, {len(people.crops)} pictures; {len(left_out)} lines on what "
        f"is left out, {len(alike)} pairs of names that look like one person",
        *left_out,
        *(f"{one} and {other} look like one person: {d:.2f} apart" for one, other, d in alike),
    ]
    with write_beside(path) as beside:
        beside.write_text("".join(f"{line}\n" for line in lines), "utf-8", "backslashreplace")


def open_shards(folder: Path, base: Base) -> People:
    """Open prepared people for training on `base`; nothing but headers is read.

    HdbError if a file is missing, cut off or another than was prepared, if the whole is not
    finished, was written by another version of hdb, or is not for this base.
    """
    path = folder / INDEX
    if not path.exists():
        raise HdbError(
            f"{folder} is not finished ({INDEX} is missing); run hdb train prepare once more: it "
            "goes on where it was"
        )
    try:
        index = json.loads(path.read_text())
        if index["kind"] != KIND:
            raise ValueError(f"it is of kind {index['kind']!r}")
        version = index["format"]
        if version == FORMAT:
            index["base"], [(f["file"], f["bytes"], f["content"]) for f in index["files"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise HdbError(
            f"{path} is not an index of prepared people ({error}); prepare them again: "
            "hdb train prepare"
        ) from error
    if version != FORMAT:
        raise HdbError(
            f"{folder} was prepared in format {version}, this hdb reads {FORMAT}; delete it and "
            "prepare again: hdb train prepare"
        )
    _check_base(folder, index["base"], base.spec.name, facts_of(base))
    return _opened(folder, index)


def _opened(folder: Path, index: dict[str, Any]) -> People:
    """Put the people of all files together; HdbError for a file that is not what the index says."""
    headers = []
    for entry in index["files"]:
        header = _header(folder / entry["file"])
        if (header.bytes, header.metadata.get("hdb.content")) != (entry["bytes"], entry["content"]):
            raise HdbError(
                f"{folder / entry['file']} is not the file that was prepared; delete it and run "
                "hdb train prepare once more"
            )
        headers.append((folder / entry["file"], header))
    names: list[str] = []
    skipped: list[str] = []
    members: list[tuple[int, ...]] = []
    styled: list[tuple[int, ...]] = []
    captions: dict[int, str] = {}
    first = 0
    for path, header in headers:
        who = _who(path, header)
        names += who["names"]
        skipped += who["left_out"]
        for mine, theirs in ((members, who["members"]), (styled, who["styled"])):
            mine += [tuple(first + k for k in group) for group in theirs]
        captions |= {first + int(k): text for k, text in who["captions"].items()}
        first += header.tensors["crops"].shape[0]
    stored = {name: StoredRows(name, headers) for name in DTYPES}
    whole = hashlib.sha256("".join(entry["content"] for entry in index["files"]).encode())
    return People(
        stored["crops"],
        tuple(names),
        tuple(members),
        tuple(skipped),
        tuple(styled),
        captions,
        stored["traits"],
        stored["latents"],
        whole.hexdigest(),
    )


class StoredRows:
    """The rows of one tensor over all files, read when they are asked for: `rows[3]` is one row,
    `rows[[7, 3]]` are two, in that order."""

    def __init__(self, name: str, headers: Sequence[tuple[Path, Header]]) -> None:
        self.paths = [path for path, _ in headers]
        infos = [header.tensors[name] for _, header in headers]
        self.starts = [
            header.start + info.offsets[0] for (_, header), info in zip(headers, infos, strict=True)
        ]
        self.first = [0, *accumulate(info.shape[0] for info in infos)]
        self.row = infos[0].shape[1:]
        self.dtype = np.dtype(DTYPES[name][1])
        self.width = self.dtype.itemsize * math.prod(self.row)
        self._open = functools.lru_cache(OPEN)(self._opened)

    def __len__(self) -> int:
        return self.first[-1]

    @property
    def shape(self) -> tuple[int, ...]:
        return len(self), *self.row

    def __getitem__(self, rows: int | Sequence[int]) -> np.ndarray:
        if isinstance(rows, int):
            return self[[rows]][0]
        found = np.empty((len(rows), *self.row), self.dtype)
        for k in sorted(range(len(rows)), key=rows.__getitem__):  # as they lie on the disk
            self._read(rows[k], found[k])
        return found

    def _read(self, row: int, into: np.ndarray) -> None:
        if not 0 <= row < len(self):
            raise IndexError(row)
        place = bisect_right(self.first, row) - 1
        path = self.paths[place]
        with reading(path):
            file = self._open(path)
            file.seek(self.starts[place] + self.width * (row - self.first[place]))
            read = file.readinto(into.data.cast("B"))
        if read != self.width:
            raise HdbError(
                f"{path} was cut off while it was in use; delete it and run hdb train prepare once "
                "more, then the same training: it goes on where it was"
            )

    @staticmethod
    def _opened(path: Path) -> BufferedReader:
        return path.open("rb")


@torch.no_grad()
def encoded(base: Base, people: People) -> People:
    """Return people in memory with what training reads beside crops: the recognisers' embeddings
    of every photo, which take most of the time, and not of pictures in a style, where they would be
    0; and the latents of every crop and of its mirror image."""
    assert isinstance(people.crops, np.ndarray)
    photos = np.zeros(len(people.crops), bool)
    photos[[photo for theirs in people.members for photo in theirs]] = True
    traits = np.zeros((len(people.crops), TRAITS), np.float32)
    latents = [np.zeros((0, 2, *base.latent_shape), np.float16)]
    step = max(1, 100 * 128**2 // base.spec.resolution**2)
    for start in range(0, len(people.crops), step):
        images = base.images(list(people.crops[start : start + step]))
        seen = start + np.flatnonzero(photos[start : start + step])
        if len(seen):
            traits[seen] = base.embed(images[seen - start]).float().cpu().numpy()
        with autocast(base.device):
            both = [
                base.backbone.encode_images(each).half().cpu() for each in (images, images.flip(-1))
            ]
        latents.append(torch.stack(both, 1).numpy())
    return replace(people, traits=traits, latents=np.concatenate(latents))


def facts_of(base: Base) -> dict[str, Any]:
    """Return what latents and crops depend on: the size and framing of a face, and how the
    autoencoder encodes a picture that is always the same."""
    latent = base.backbone.encode_images(_probe(base))[0].float().cpu()
    numbers = latent.flatten()
    chosen = numbers[:: max(1, len(numbers) // PROBED)][:PROBED]
    return {
        "name": base.spec.name,
        "resolution": base.spec.resolution,
        "template": [list(point) for point in base.spec.template],
        "latent": list(latent.shape),
        "deviation": float(numbers.std()),
        "probe": [round(value, 4) for value in chosen.tolist()],
    }


def _probe(base: Base) -> Tensor:
    """Return a picture (1, 3, S, S) of waves, the same for all time."""
    across = torch.linspace(0, 6, base.spec.resolution)
    waves = [torch.sin(across[:, None] * k + across[None] * (3 - k)) for k in range(3)]
    return torch.stack(waves)[None].to(base.device)


def _check_base(folder: Path, theirs: dict[str, Any], name: str, mine: dict[str, Any]) -> None:
    """Raise HdbError unless what was prepared for one base serves another: a fine-tune with the
    same autoencoder may use it."""
    facts = ("resolution", "template", "latent")
    why = next(
        (f"{f} {theirs.get(f)}, not {mine[f]}" for f in facts if theirs.get(f) != mine[f]), ""
    )
    if not why:
        far = (Tensor(theirs["probe"]) - Tensor(mine["probe"])).abs().max()
        why = "" if far <= CLOSE * mine["deviation"] else "another autoencoder"
    if why:
        raise HdbError(
            f"{folder} was prepared for {theirs.get('name')}, which does not fit {name} ({why}); "
            f"prepare the photos for it: hdb train prepare --base {name}"
        )


def _parts(
    persons: Persons, out: Path, spec: BaseSpec, facts: dict[str, Any], aligned: bool
) -> list[Part]:
    """Divide people, in order, among files of about FILE_BYTES."""
    size = 3 * spec.resolution**2 + 4 * math.prod(facts["latent"])
    most = max(1, FILE_BYTES // size)
    groups: list[dict[str, Sequence[Path]]] = []
    held = most
    for name, files in persons.items():
        if held >= most:
            groups.append({})
            held = 0
        groups[-1][name] = files
        held += len(files)
    stable = {key: facts[key] for key in ("resolution", "template", "latent")}
    return [
        Part(out / f"people-{k:05d}.safetensors", group, _made_of(group, stable, aligned))
        for k, group in enumerate(groups)
    ]


def _made_of(persons: Persons, facts: dict[str, Any], aligned: bool) -> str:
    """Name all that decides what is in a file; like make, trust sizes and times of the photos."""
    whole = hashlib.sha256(json.dumps([FORMAT, facts, aligned], sort_keys=True).encode())
    for name, files in persons.items():
        whole.update(repr(name).encode())
        for file in files:
            for each in (file, file.with_suffix(".txt")):
                try:
                    found = each.stat()
                    what: object = found.st_size, found.st_mtime_ns
                except OSError:
                    what = None
                whole.update(repr((each.name, what)).encode())
    return whole.hexdigest()


def _kept(part: Part, name: str, facts: dict[str, Any]) -> Header | None:
    """Return the header of a part that is whole and still up to date; None if it is to be made.

    HdbError if it was prepared for another base, which a wrong --out must not destroy.
    """
    if not part.file.exists():
        return None
    try:
        header = _header(part.file)
        theirs = json.loads(header.metadata["hdb.base"])
    except (HdbError, ValueError):
        return None
    _check_base(part.file.parent, theirs, name, facts)
    return header if header.metadata["hdb.made_of"] == part.made_of else None


def _header(path: Path) -> Header:
    """Read the header of one file; HdbError if it is damaged, cut off, or of another version."""
    advice = "delete it and run hdb train prepare once more: it makes what is missing"
    try:
        header = read_header(path, LARGEST)
    except HdbError as error:
        raise HdbError(f"{error}; {advice}") from error
    kind, version = header.metadata.get("hdb.kind"), header.metadata.get("hdb.format")
    if kind != KIND:
        raise HdbError(f"{path} does not hold prepared people; {advice}")
    if version != str(FORMAT):
        raise HdbError(f"{path} has format {version}, this hdb reads {FORMAT}; {advice}")
    count = {info.shape[0] for info in header.tensors.values() if info.shape}
    right = {name: dtype for name, (dtype, _) in DTYPES.items()}
    if {n: i.dtype for n, i in header.tensors.items()} != right or len(count) != 1:
        raise HdbError(f"{path} holds other tensors than prepared people do; {advice}")
    return header


def _who(path: Path, header: Header) -> dict[str, Any]:
    """Return who is in a file: names, members, styled, captions, left_out."""
    try:
        return json.loads(header.metadata["hdb.people"])
    except (KeyError, ValueError) as error:
        raise HdbError(f"{path} does not say who is in it ({error}); delete it") from error


def _write(part: Part, people: People, facts: dict[str, Any]) -> None:
    arrays = {"crops": people.crops, "traits": people.traits, "latents": people.latents}
    tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
    who = {
        "names": people.names,
        "members": people.members,
        "styled": people.styled,
        "captions": people.captions,
        "left_out": people.skipped,
    }
    content = hashlib.sha256(json.dumps([part.made_of, who]).encode())
    for array in arrays.values():
        content.update(np.ascontiguousarray(array).tobytes())
    metadata = {
        "format": "pt",
        "hdb.kind": KIND,
        "hdb.format": str(FORMAT),
        "hdb.base": json.dumps(facts),
        "hdb.made_of": part.made_of,
        "hdb.content": content.hexdigest(),
        "hdb.people": json.dumps(who),
    }
    try:
        with write_beside(part.file) as beside:
            save_tensors(tensors, beside, metadata)
    except HdbError as error:
        raise HdbError(f"{error}; what was prepared is kept: run the same command again") from error


def _files(folder: Path) -> list[Path]:
    return sorted(folder.glob("people-*.safetensors"))


def twins(people: People, tell: Tell) -> Iterator[tuple[str, str, float]]:
    """Find names that look like one person: pairs whose mean embeddings lie closer than ALIKE, the
    closest first."""
    assert people.traits is not None
    means = torch.zeros(len(people.names), NUMBERS)
    for person, photos in enumerate(people.members):
        means[person] = torch.from_numpy(people.traits[list(photos)][:, :NUMBERS]).mean(0)
    found = []
    for start in range(0, len(means), 1024):
        tell("compare", start, len(means))
        far = torch.cdist(means[start : start + 1024], means)
        for one, other in (far < ALIKE).nonzero().tolist():
            if start + one < other:
                found.append((start + one, other, float(far[one, other])))
    for one, other, distance in sorted(found, key=lambda pair: pair[2]):
        yield people.names[one], people.names[other], distance
