"""Align photographs of faces, paint each in every style, and keep all in a few files of arrays.

A folder holds `people/NNNN/K.jpg`, photo K of person N, and `nobodies/*.jpg`, image models'
pictures of faces that nobody has. Held out of every training step: people 0000 to 0099 and every
tenth nobody, sorted by name.

Written to `BUILD/photographs/`: `train-000.safetensors`, ... and `heldout-000.safetensors`, ...,
shards of PER_SHARD photographs in a seeded random order, each with the tensors

    pixels  (N, 128, 128, 3)  uint8    RGB; what `tiny` draws, a face aligned to its template
    styles  (N,)              uint8    index into STYLES (portrait, selfie, pixar, ...)
    people  (N,)              int32    NNNN, or NOBODY + the place in the sorted names of nobodies
    kinds   (N,)              uint8    index into KINDS
    photos  (N,)              int32    K; 0 for a nobody
    points  (N, 5, 2)         float32  the detector's five points in this picture, in pixels;
                                       styles move them: embed each picture through its own

The portrait is the plain crop, exactly as `hdb` cuts it. A shard that is there is not made again.
`read_photographs` reads the shards that are there as one `Photographs`.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from hdbcli.faces.photo import align, find_faces, read_photo, similarity
from registry.checkpoints.safetensors import save_tensors
from registry.errors import HdbError
from registry.files import write_beside
from registry.tiny import TEMPLATE
from registry.tiny.recipe.paint import paint
from registry.tiny.recipe.pictures import STYLES, Pictures
from registry.tiny.recipe.styles import CAPTIONS
from registry.tiny.recipe.subject import Reader, wide_crop

SIDE = 128
PER_SHARD = 64  # photographs
HELD_PEOPLE, HELD_NOBODY = 100, 10  # people below the one, every so many-th nobody
NOBODY = 100_000  # numbers of nobodies start here
REAL = 500_000  # and those of all photographed people, as folders beside rendered ones
# How a picture looks, which its captions tell: a photograph of a person, an image model's often
# cinematic picture of nobody, a rendered head.
KINDS = ("person", "nobody", "render")
_MODELS = ("SDXL_", "FLUX1_")  # the nobodies beside them were made as plain portrait photographs


@dataclass(frozen=True)
class Photographs(Pictures):
    """N pictures as in `Pictures`; `kinds` (N,) index into KINDS, `photos` (N,), `points` (N, 5, 2)
    in pixels."""

    kinds: Tensor
    photos: Tensor
    points: Tensor


@dataclass(frozen=True)
class Source:
    """One photograph of the folder: its file, whose it is and what it looks like."""

    file: Path
    person: int
    photo: int
    kind: int
    held: bool


def sources(folder: Path) -> list[Source]:
    """List the photographs of a folder, sorted. Raise HdbError if there is none."""
    found = []
    for file in sorted((folder / "people").glob("[0-9]*/[0-9]*.jpg")):
        person = int(file.parent.name)
        found.append(Source(file, person, int(file.stem), 0, person < HELD_PEOPLE))
    for index, file in enumerate(sorted((folder / "nobodies").glob("*.jpg"))):
        kind = KINDS.index("nobody" if file.name.startswith(_MODELS) else "person")
        found.append(Source(file, NOBODY + index, 0, kind, index % HELD_NOBODY == 0))
    if not found:
        raise HdbError(f"{folder} holds no people/NNNN/K.jpg and no nobodies/*.jpg")
    return found


def paint_photographs(
    data: Path, build: Path, seed: int = 0, variants: int = 1, workers: tuple[int, int] = (0, 1)
) -> Iterator[tuple[int, int, float]]:
    """Write the shards of every photograph in `data`; yield (photographs done, of how many,
    seconds). `variants` is how often each style is painted; `workers` is (this one, how many).
    """
    out = build / "photographs"
    out.mkdir(parents=True, exist_ok=True)
    todo = [shard for shard in _shards(data, seed) if not (out / shard[0]).exists()]
    todo = todo[workers[0] :: workers[1]]
    cv2.setNumThreads(1)  # pictures are small: processes share the work better than threads
    reader = Reader(build / "assets")
    total = sum(len(part) for _, part in todo)
    done, start = 0, time.perf_counter()
    for name, part in todo:
        rows: list[tuple] = []
        for source in part:
            rows += _pictures(source, reader, seed, variants)
            done += 1
            yield done, total, time.perf_counter() - start
        columns = [np.stack(column) for column in zip(*rows, strict=True)]
        names = ("pixels", "styles", "people", "kinds", "photos", "points")
        types = (np.uint8, np.uint8, np.int32, np.uint8, np.int32, np.float32)
        tensors = {
            key: torch.from_numpy(column.astype(dtype))
            for key, column, dtype in zip(names, columns, types, strict=True)
        }
        with write_beside(out / name) as beside:
            save_tensors(tensors, beside, {"format": "pt"})


def read_photographs(build: Path, held: bool = False) -> Photographs:
    """Read the shards that are there, those to train on or those held out. Raise HdbError
    where there is none."""
    shards = [load_file(file) for file in _files(build, held)]
    count = sum(len(shard["people"]) for shard in shards)
    pixels = torch.empty(count, 3, SIDE, SIDE, dtype=torch.uint8)
    at = 0
    for shard in shards:
        part = shard.pop("pixels")
        pixels[at : at + len(part)] = part.permute(0, 3, 1, 2)
        at += len(part)
    rest = {key: torch.cat([shard[key] for shard in shards]) for key in shards[0]}
    return Photographs(
        pixels,
        rest["styles"].long(),
        rest["people"].long(),
        rest["kinds"].long(),
        rest["photos"].long(),
        rest["points"],
    )


def _files(build: Path, held: bool) -> list[Path]:
    """List the shards that are there, those to train on or those held out."""
    files = sorted((build / "photographs").glob("heldout-*" if held else "train-*"))
    if not files:
        raise HdbError(f"no photographs in {build}; run the photographs step first")
    return files


def _shards(data: Path, seed: int) -> list[tuple[str, list[Source]]]:
    """Deal the photographs out: name and contents of every shard, those to train on first."""
    everything = sources(data)
    shards = []
    for held, name in ((False, "train"), (True, "heldout")):
        some = [source for source in everything if source.held == held]
        order = np.random.default_rng(seed).permutation(len(some))
        for number, first in enumerate(range(0, len(some), PER_SHARD)):
            part = [some[i] for i in order[first : first + PER_SHARD]]
            shards.append((f"{name}-{number:03d}.safetensors", part))
    return shards


def _pictures(source: Source, reader: Reader, seed: int, variants: int) -> list[tuple]:
    """Return the rows of one photograph; none where no face is found in it, and the portrait alone
    where the painters do not see what is where."""
    rgb = read_photo(source.file)
    faces = find_faces(rgb)
    if not faces:
        return []
    middle = np.array(rgb.shape[1::-1]) / 2
    # Crops are centred on the one meant; a face behind may be larger.
    face = min(faces, key=lambda f: np.linalg.norm(f.landmarks.mean(axis=0) - middle) / f.side)
    template = np.array(TEMPLATE)
    turn, shift = similarity(face.landmarks, template * SIDE)
    moved = turn * (face.landmarks[:, 0] + 1j * face.landmarks[:, 1]) + shift
    about = (source.person, source.kind, source.photo)
    plain = align(rgb, face.landmarks, template, SIDE)
    rows = [(plain, STYLES.index("portrait"), *about, np.stack([moved.real, moved.imag], axis=1))]
    subject = reader.read(wide_crop(rgb, face.landmarks))
    if subject is None:
        return rows
    for style in STYLES[1:]:
        for variant in range(variants):
            key = [seed, source.person, source.photo, STYLES.index(style), variant]
            drawn = paint(subject, style, np.random.default_rng(key), SIDE)
            rows.append((drawn.pixels, STYLES.index(style), *about, drawn.points))
    return rows


def write_people(build: Path, held: bool = False) -> Iterator[tuple[int, int]]:
    """Write the photographs to train on as `BUILD/people/NNNNNN/STYLE-K.png`, those that are held
    out to `BUILD/heldout`: a folder for each person, as hdb and the other steps read people; yield
    (done, of how many).

    A picture in a style has its caption beside it, a portrait has none.
    """
    out = build / ("heldout" if held else "people")
    shards = _files(build, held)
    for done, file in enumerate(shards, 1):
        shard = load_file(file)
        for pixels, style, person, photo in zip(
            *(shard[key] for key in ("pixels", "styles", "people", "photos")), strict=True
        ):
            folder, name = out / f"{REAL + int(person):06d}", STYLES[int(style)]
            folder.mkdir(parents=True, exist_ok=True)
            number = sum(1 for _ in folder.glob(f"{name}-{int(photo)}*.png"))
            stem = f"{name}-{int(photo)}" + (f"-{number}" if number else "")
            cv2.imwrite(str(folder / f"{stem}.png"), pixels.numpy()[:, :, ::-1])
            if name != "portrait":
                (folder / f"{stem}.txt").write_text(f"{CAPTIONS[name]}\n")
        yield done, len(shards)
