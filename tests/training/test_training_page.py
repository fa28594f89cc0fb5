"""The five commands of docs/training.md, as they stand there, on a cut-down base: from a checkpoint
to a base that predicts."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from commands import ok, told

if TYPE_CHECKING:
    from cutdown import Narrow

ROOT = Path(__file__).parents[2]
HELD_OUT = ROOT / "tests/data/heldout"
CHECKPOINT = "v1-5-pruned-emaonly.safetensors"
SHORT = ["--steps", "2", "--batch", "2", "--held-out", "0", "--device", "cpu"]


def commands() -> list[list[str]]:
    page = (ROOT / "docs/training.md").read_text()
    block = page.split("## Five commands")[1].split("\n\n")[1]
    return [line.split()[1:] for line in block.splitlines()]


def test_five_commands_from_a_checkpoint_to_a_base_that_predicts(
    narrow: Narrow,
    hdb_home: Path,
    tmp_path: Path,
    astronaut: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copy(narrow.single("sd1"), CHECKPOINT)
    everybody = sorted(HELD_OUT.iterdir())
    for folder, people in (("faces", everybody[:4]), ("strangers", everybody[4:6])):
        for person in people:
            shutil.copytree(person, tmp_path / folder / person.name)
    words = commands()
    assert [w[:2] for w in words] == [
        ["base", "add"],
        ["train", "prepare"],
        ["train", "hypernetwork"],
        ["train", "evaluate"],
        ["base", "set-hypernetwork"],
    ]
    for command in words:
        more = {"hypernetwork": SHORT, "evaluate": ["--device", "cpu"]}.get(command[1], [])
        ok(*command, *more)
        if command[1] == "add":  # the control: nothing to predict with yet
            assert told("base", "show", "sd15")["hypernetwork"] is False
    assert told("base", "show", "sd15")["hypernetwork"] is True
    made = told("new", astronaut, "ann", "--base", "sd15", "--no-refine", "--yes", "--no-preview")
    assert made["base"] == "sd15"
