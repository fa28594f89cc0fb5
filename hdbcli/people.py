"""Read a folder of people: a folder of photos per person, or one photo per person side by side."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from hdbcli.config import Tell
from hdbcli.errors import HdbError
from hdbcli.photo import crop_face, read_photo
from registry.spec import BaseSpec

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")


@dataclass(frozen=True, eq=False)
class People:
    """Aligned crops (N, S, S, 3) uint8 of P people; `members[p]` indexes the crops of person p."""

    crops: np.ndarray
    names: tuple[str, ...]
    members: tuple[tuple[int, ...], ...]
    skipped: tuple[str, ...]

    def first(self, count: int | None) -> People:
        """Return the first so many people, or all."""
        return People(self.crops, self.names[:count], self.members[:count], self.skipped)

    def hold_out(self, wanted: int) -> tuple[People, People | None]:
        """Divide into those to train on and the last `wanted`, at most a tenth: None if that is
        fewer than two."""
        last = min(wanted, len(self.names) // 10)
        if last < 2:  # one alone has no other's theta to compare with
            return self, None
        keep = len(self.names) - last
        first = People(self.crops, self.names[:keep], self.members[:keep], self.skipped)
        return first, People(self.crops, self.names[keep:], self.members[keep:], self.skipped)


def read_people(folder: Path, spec: BaseSpec, pattern: str, aligned: bool, tell: Tell) -> People:
    """Read and crop every photo matching `pattern`; photos without one clear face are skipped and
    named.

    `aligned` says that the pictures already are crops of the base's size and framing.
    """
    if folder.is_file():
        persons = {folder.stem: [folder]}
    elif folder.is_dir():
        persons = _persons(folder, pattern)
    else:
        raise HdbError(f"{folder} does not exist; give a folder of photos, or a folder per person")
    if not persons:
        raise HdbError(f"no photo in {folder} matches {pattern!r} ({', '.join(SUFFIXES)})")
    total = sum(len(files) for files in persons.values())
    crops: list[np.ndarray] = []
    members: dict[str, list[int]] = {}
    skipped = []
    done = 0
    for name, files in persons.items():
        for file in files:
            done += 1
            tell("read", done, total)
            try:
                crop = _read(file, spec, aligned)
            except HdbError as error:
                skipped.append(str(error))
                continue
            members.setdefault(name, []).append(len(crops))
            crops.append(crop)
    if not crops:
        raise HdbError(f"none of the {total} photos in {folder} can be used; first: {skipped[0]}")
    return People(
        np.stack(crops), tuple(members), tuple(tuple(m) for m in members.values()), tuple(skipped)
    )


def _persons(folder: Path, pattern: str) -> dict[str, list[Path]]:
    def photos(place: Path) -> list[Path]:
        return sorted(f for f in place.glob(pattern) if f.suffix.lower() in SUFFIXES)

    folders = sorted(f for f in folder.iterdir() if f.is_dir() and not f.name.startswith("."))
    persons = {place.name: photos(place) for place in folders}
    if not any(persons.values()):
        persons = {file.stem: [file] for file in photos(folder)}
    return {name: files for name, files in persons.items() if files}


def _read(file: Path, spec: BaseSpec, aligned: bool) -> np.ndarray:
    if not aligned:
        return crop_face(file, np.array(spec.template), spec.resolution).image
    image = read_photo(file)
    if image.shape[:2] != (spec.resolution, spec.resolution):
        height, width = image.shape[:2]
        raise HdbError(f"{file} is {width} x {height} px, an aligned crop has {spec.resolution}")
    return image
