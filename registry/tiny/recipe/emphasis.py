"""Choose people and pictures in the styles that keep least of who somebody is, to train a
hypernetwork on once it serves all styles."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from registry.errors import HdbError
from registry.tiny.recipe.pictures import style_of

# Styles and how many people show them: the first group with room that somebody has pictures of.
# The professional shot's face is small; the last three are there so that they are not forgotten.
GROUPS = (
    (("professional",), 1400),
    (("pixar",), 800),
    (("bark", "selfie", "rockstar"), 800),
)


def emphasise(
    people: Path, out: Path, groups: Sequence[tuple[tuple[str, ...], int]] = GROUPS
) -> int:
    """Link the portraits of the first people that fill the groups, and their pictures in their
    group's styles, into `out`; return how many people that are."""
    if out.exists():
        raise HdbError(f"{out} is there already; delete it to choose again")
    beside = out.with_name(f".{out.name}.part")
    shutil.rmtree(beside, ignore_errors=True)
    room = dict(groups)
    for person in sorted(people.iterdir()):
        pictures = sorted(person.glob("*.png"))
        shown = {style_of(file) for file in pictures}
        chosen = next((g for g, left in room.items() if left and shown & set(g)), None)
        if chosen is None:
            continue
        room[chosen] -= 1
        folder = beside / person.name
        folder.mkdir(parents=True)
        for file in pictures:
            if style_of(file) in ("portrait", *chosen):
                for each in (file, file.with_suffix(".txt")):  # with its caption
                    if each.exists():
                        os.symlink(each.resolve(), folder / each.name)
    if not beside.exists():
        raise HdbError(f"no pictures in these styles in {people}; run the render step first")
    beside.rename(out)
    return sum(count for _, count in groups) - sum(room.values())
