"""The pictures of `hdb gen`: named before the work, saved as they are drawn."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import zip_longest
from pathlib import Path
from typing import Any

from hdbcli.api import Picture
from hdbcli.config import PICTURES
from hdbcli.model.contact_sheet import contact_sheet, in_rows
from registry.errors import HdbError
from registry.files import Taken, check_writable


@dataclass(frozen=True)
class Outputs:
    """Where pictures go: a file each, or none of them, and the contact sheet, if one is wanted."""

    pictures: tuple[Path, ...]
    grid: Path | None
    named: bool = False  # by the user, who may have them replaced


def plan_outputs(out: Path | None, stems: Sequence[str], grid: bool) -> Outputs:
    """Name the files before the work: `STEM.png` in a folder, or exactly the .png given.

    Nothing is overwritten but a file that was named itself. Raise HdbError for what cannot be
    written.
    """
    kind = "" if out is None or out.is_dir() else out.suffix.lower()
    if kind in PICTURES and kind != ".png":
        raise HdbError(f"{out} is not named .png, the kind of picture that hdb draws")
    if out is not None and kind == ".png":
        if len(stems) > 1 and not grid:
            raise HdbError(
                f"{out} is one file, {len(stems)} pictures were asked for; give a folder, -n 1, or "
                "--grid for a sheet of them"
            )
        check_writable(out)
        return Outputs((), out) if grid else Outputs((out,), None, named=True)
    folder = out or Path()
    if folder.exists() and not folder.is_dir():
        raise HdbError(f"{folder} is a file; give a folder or a name that ends in .png")
    paths: list[Path] = []
    for stem in stems:  # two files in different folders may have one stem
        paths.append(_free(folder, stem, paths))
    check_writable(paths[0])
    return Outputs(tuple(paths), _free(folder, f"{stems[0]}-grid") if grid else None)


def _free(folder: Path, stem: str, taken: Sequence[Path] = ()) -> Path:
    path, again = folder / f"{stem}.png", 2
    while path.exists() or path in taken:
        path, again = folder / f"{stem}-{again}.png", again + 1
    return path


@dataclass
class Album:
    """Saves each picture once: also where a run begins again with less memory."""

    outputs: Outputs
    pictures: list[Picture] = field(default_factory=list)
    paths: list[Path] = field(default_factory=list)

    def keep(self, drawn: Sequence[Picture]) -> None:
        """Save what is new among the pictures drawn so far."""
        for picture in drawn[len(self.pictures) :]:
            if self.outputs.named:
                path = self.outputs.pictures[0]
                picture.save(path)
                self.paths.append(path)
            elif self.outputs.pictures:
                self.paths.append(_save_free(picture, self.outputs.pictures[len(self.pictures)]))
            self.pictures.append(picture)

    def close(self) -> dict[str, Any]:
        """Save the contact sheet, if one is wanted; return all as `hdb gen --json` prints it."""
        grid = self.outputs.grid
        if grid:
            people, count = len({picture.name for picture in self.pictures}), len(self.pictures)
            columns = count // people if people > 1 else min(4, count)
            rows = in_rows([picture.image for picture in self.pictures], columns)
            replace(self.pictures[0], image=contact_sheet(rows)).save(grid)
        listed = [
            {"name": picture.name, "path": str(path) if path else None, "seed": picture.seed}
            for path, picture in zip_longest(self.paths, self.pictures)
        ]
        return {"pictures": listed, "grid": str(grid) if grid else None}


def _save_free(picture: Picture, path: Path) -> Path:
    """Write a PNG under this name, or the next that is free if by now another run has taken it."""
    stem = path.stem
    while True:
        try:
            picture.save(path, new=True)
            return path
        except Taken:
            path = _free(path.parent, stem)
