"""Read a folder of people: a folder of photos per person, or one photo per person side by side."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from torch import Tensor

from hdbcli.config import PICTURES, PLACEHOLDER, PORTRAIT, Tell
from hdbcli.errors import HdbError
from hdbcli.faces.photo import crop_face, read_photo
from registry.spec import BaseSpec


@dataclass(frozen=True, eq=False)
class People:
    """Aligned crops (N, S, S, 3) uint8 of P people.

    `members[p]` indexes the photos of person p, `styled[p]` pictures of them with a caption of
    their own, which are drawn in training and never read.
    """

    crops: np.ndarray
    names: tuple[str, ...]
    members: tuple[tuple[int, ...], ...]
    skipped: tuple[str, ...] = ()
    styled: tuple[tuple[int, ...], ...] = ()
    captions: Mapping[int, str] = field(default_factory=dict)  # of the styled

    def first(self, count: int | None) -> People:
        """Return the first so many people, or all."""
        return self._part(slice(count))

    def hold_out(self, wanted: int) -> tuple[People, People | None]:
        """Divide into those to train on and the last `wanted`, at most a tenth: None if that is
        fewer than two."""
        last = min(wanted, len(self.names) // 10)
        if last < 2:  # one alone has no other's theta to compare with
            return self, None
        keep = len(self.names) - last
        return self._part(slice(keep)), self._part(slice(keep, None))

    def caption(self, drawn: Tensor) -> list[str]:
        """Return the captions of pictures (P, K), people fastest, as samples lie."""
        return [self.captions.get(index, PORTRAIT) for index in drawn.T.flatten().tolist()]

    def _part(self, part: slice) -> People:
        return replace(
            self, names=self.names[part], members=self.members[part], styled=self.styled[part]
        )


def read_people(folder: Path, spec: BaseSpec, pattern: str, aligned: bool, tell: Tell) -> People:
    """Read and crop every photo matching `pattern`; photos without one clear face are skipped and
    named.

    `aligned` says that the pictures already are crops of the base's size and framing. A picture
    with a caption beside it (PICTURE.txt, as trainers have it) shows its person in that style.
    """
    skipped: list[str] = []
    if folder.is_file():
        persons = {folder.stem: [folder]}
    elif folder.is_dir():
        persons, skipped = photos_by_person(folder, pattern)
    else:
        raise HdbError(f"{folder} does not exist; give a folder of photos, or a folder per person")
    if not persons:
        raise HdbError(f"no photo in {folder} matches {pattern!r} ({', '.join(PICTURES)})")
    total = sum(len(files) for files in persons.values())
    crops: list[np.ndarray] = []
    members: dict[str, list[int]] = {name: [] for name in persons}
    styled: dict[str, list[int]] = {name: [] for name in persons}
    captions: dict[int, str] = {}
    done = 0
    for name, files in persons.items():
        for file in files:
            done += 1
            tell("read", done, total)
            try:
                crop, caption = _read(file, spec, aligned), _caption(file)
            except HdbError as error:
                skipped.append(str(error))
                continue
            if caption:
                captions[len(crops)] = caption
            (styled if caption else members)[name].append(len(crops))
            crops.append(crop)
    names = tuple(name for name in persons if members[name])
    if not names:
        reason = f"; first: {skipped[0]}" if skipped else ": all have captions of their own"
        raise HdbError(f"none of the {total} photos in {folder} can be used{reason}")
    skipped += [
        f"all pictures of {name} have captions of their own; add a photo without one"
        for name in persons
        if styled[name] and not members[name]
    ]
    return People(
        np.stack(crops),
        names,
        tuple(tuple(members[name]) for name in names),
        tuple(skipped),
        tuple(tuple(styled[name]) for name in names),
        captions,
    )


def _caption(file: Path) -> str | None:
    """Return the caption beside a picture, with [V] for the person; None without one."""
    beside = file.with_suffix(".txt")
    if not beside.exists():
        return None
    try:
        caption = " ".join(beside.read_text(encoding="utf-8").split())
    except (OSError, ValueError) as error:
        raise HdbError(
            f"{beside} cannot be read as a caption ({error}); mend or remove it"
        ) from None
    if PLACEHOLDER not in caption:
        raise HdbError(f"{beside} says {caption[:60]!r}; put {PLACEHOLDER} where the person is")
    return caption


def photos_by_person(folder: Path, pattern: str) -> tuple[dict[str, list[Path]], list[str]]:
    """Return the photos of everybody by name, and what is said of those that are nobody's."""

    def photos(place: Path) -> list[Path]:
        try:
            return sorted(f for f in place.glob(pattern) if f.suffix.lower() in PICTURES)
        except (ValueError, NotImplementedError) as error:
            raise HdbError(f"no pattern of file names: {pattern!r} ({error})") from None

    folders = sorted(f for f in folder.iterdir() if f.is_dir() and not f.name.startswith("."))
    persons = {place.name: files for place in folders if (files := photos(place))}
    loose = photos(folder)
    if persons:
        why = f"lies beside the folders of people; put it into its person's folder in {folder}"
        return persons, [f"{file.name} {why}" for file in loose]
    stems = Counter(file.stem for file in loose)
    return {file.stem if stems[file.stem] == 1 else file.name: [file] for file in loose}, []


def _read(file: Path, spec: BaseSpec, aligned: bool) -> np.ndarray:
    if not aligned:
        return crop_face(file, np.array(spec.template), spec.resolution).image
    image = read_photo(file)
    if image.shape[:2] != (spec.resolution, spec.resolution):
        height, width = image.shape[:2]
        raise HdbError(f"{file} is {width} x {height} px, an aligned crop has {spec.resolution}")
    return image
