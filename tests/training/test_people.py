"""A folder of people: who is in it, and what is said of pictures that are left out."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hdbcli.model.base import Base
from hdbcli.training.people import People, read_people


def read(folder: Path, tiny: Base) -> People:
    return read_people(folder, tiny.spec, "*", True, lambda *_: None)


def picture(file: Path, caption: str | None = None) -> None:
    file.parent.mkdir(exist_ok=True)
    Image.fromarray(np.zeros((128, 128, 3), np.uint8)).save(file)
    if caption:
        file.with_suffix(".txt").write_text(caption)


def test_loose_photos_beside_folders_are_told(tiny: Base, tmp_path: Path) -> None:
    picture(tmp_path / "ann" / "0.png")
    assert read(tmp_path, tiny).skipped == ()  # the control
    picture(tmp_path / "ben.png")
    people = read(tmp_path, tiny)
    (said,) = people.skipped
    assert people.names == ("ann",)
    assert (
        said.startswith("ben.png lies beside the folders of people; put it into")
        and str(tmp_path) in said
    )


@pytest.mark.parametrize("twins", [False, True])
def test_loose_photos_of_one_stem_are_two_people(tiny: Base, tmp_path: Path, twins: bool) -> None:
    for name in ("a.jpg", "a.png", "b.png") if twins else ("a.jpg", "b.png"):
        picture(tmp_path / name)
    people = read(tmp_path, tiny)
    assert people.names == (("a.jpg", "a.png", "b") if twins else ("a", "b"))
    assert people.members == tuple((i,) for i in range(2 + twins)) and people.skipped == ()


def test_people_without_a_photo_to_read_are_told(tiny: Base, tmp_path: Path) -> None:
    picture(tmp_path / "ann" / "0.png")
    picture(tmp_path / "ann" / "bark.png", "a [V] face with bark skin")
    assert read(tmp_path, tiny).skipped == ()  # the control
    picture(tmp_path / "ben" / "bark.png", "a [V] face with bark skin")
    people = read(tmp_path, tiny)
    assert people.names == ("ann",)
    assert people.skipped == (
        "all pictures of ben have captions of their own; add a photo without one",
    )
