"""The pictures of `hdb gen`: named before the work, saved as they are drawn."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hdbcli.cli.options import free_path
from hdbcli.config import PICTURES
from registry.errors import HdbError, UsageError
from registry.files import Taken, check_writable, refuse_file_as_folder, write_kept

if TYPE_CHECKING:
    from hdbcli.api import Drawn, Picture

WORDS = 48  # letters of a prompt in a file's name


@dataclass(frozen=True)
class Outputs:
    """Where pictures go: a file each, or none of them, and the contact sheet and the page, if they
    are wanted."""

    pictures: tuple[Path, ...]
    grid: Path | None
    page: Path | None = None
    named: bool = False  # by the user, who may have them replaced


def stem_of(name: str, prompt: str, seed: int) -> str:
    """Return how the file of a picture is called: by whom it shows, the first words of the prompt
    in letters that every system takes, and the seed."""
    text = unicodedata.normalize("NFKD", prompt).encode("ascii", "ignore").decode().lower()
    words = re.sub(r"[^a-z0-9]+", "-", text)
    if len(words) > WORDS:
        words = words[:WORDS].rpartition("-")[0] or words[:WORDS]
    return "-".join(filter(None, (name, words.strip("-"), str(seed))))


def plan_outputs(out: Path | None, stems: Sequence[str], grid: bool, page: bool = False) -> Outputs:
    """Name the files before the work: `STEM.png` in a folder, or exactly the .png given.

    Nothing is overwritten but a file that was named itself. Raise HdbError for what cannot
    be written.
    """
    kind = "" if out is None or out.is_dir() else out.suffix.lower()
    if kind in PICTURES and kind != ".png":
        raise UsageError(f"{out} is not named .png, the kind of picture that hdb draws")
    if out is not None and kind == ".png":
        if len(stems) > 1 and not grid:
            raise UsageError(
                f"{out} is one file, {len(stems)} pictures were asked for; give a folder, -n 1, or "
                "--grid for a sheet of them"
            )
        check_writable(out)
        beside = free_path(out.parent, out.stem, suffix=".html") if page else None
        return Outputs((), out, beside) if grid else Outputs((out,), None, beside, named=True)
    folder = out or Path()
    refuse_file_as_folder(folder, "give a folder, or a name that ends in .png")
    if folder.exists() and not folder.is_dir():
        raise HdbError(f"{folder} is a file; give a folder or a name that ends in .png")
    paths: list[Path] = []
    for stem in stems:  # two files in different folders may have one stem
        paths.append(free_path(folder, stem, paths))
    check_writable(paths[0])
    return Outputs(
        tuple(paths),
        free_path(folder, f"{stems[0]}-grid") if grid else None,
        free_path(folder, stems[0], suffix=".html") if page else None,
    )


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

    def close(self, drawn: Drawn) -> dict[str, Any]:
        """Save the contact sheet and the page, if they are wanted; return all files as `hdb gen
        --json` prints them."""
        grid, page = self.outputs.grid, self.outputs.page
        if grid:
            drawn.sheet().save(grid)
        if page:
            text = drawn.html()
            write_kept(page, lambda file: file.write_text(text, encoding="utf-8"))
        listed = [
            {
                "name": picture.name,
                "path": path,
                "prompt": picture.prompt,
                "seed": picture.seed,
            }
            for path, picture in zip_longest(self.paths, self.pictures)
        ]
        return {
            "pictures": listed,
            "grid": grid,
            "html": page,
        }


def _save_free(picture: Picture, path: Path) -> Path:
    """Write a PNG under this name, or the next that is free if by now another run has taken it."""
    stem = path.stem
    while True:
        try:
            picture.save(path, new=True)
            return path
        except Taken:
            path = free_path(path.parent, stem)
