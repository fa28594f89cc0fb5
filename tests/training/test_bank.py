"""The bank: resumable, the same whatever a shard holds, and a distance that ignores the gauge."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest
import torch
from commands import hdb, told

from hdbcli.config import BankConfig
from hdbcli.method.lidb import Theta, inner
from hdbcli.model.base import Base
from hdbcli.training.bank import build_bank, read_bank
from hdbcli.training.objective import weight_loss
from hdbcli.training.people import People, read_people
from hdbcli.training.shards import encoded
from registry.errors import HdbError

HELD_OUT = Path(__file__).parents[1] / "data/heldout"
CONFIG = BankConfig(steps=2, batch=2, at_once=2)


def quiet(stage: str, done: int, total: int) -> None: ...


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Copy five held-out people, one photo each."""
    place = tmp_path_factory.mktemp("people")
    for person in sorted(HELD_OUT.iterdir())[:5]:
        shutil.copy(person / "photo-0.jpg", place / f"{person.name}.jpg")
    return place


@pytest.fixture(scope="module")
def people(folder: Path, tiny: Base) -> People:
    return encoded(tiny, read_people(folder, tiny.spec, "*", False, quiet))


def test_a_cut_off_bank_goes_on(tiny: Base, people: People, tmp_path: Path) -> None:
    shards = list(build_bank(tiny, people, tmp_path / "whole", CONFIG, quiet))
    assert [s.people for s in shards] == [2, 2, 1] and shards[-1].total == 5
    assert all(s.loss_end < s.loss_start for s in shards)
    list(islice(build_bank(tiny, people, tmp_path / "cut", CONFIG, quiet), 1))
    assert len(read_bank(tmp_path / "cut", tiny)) == 2
    assert len(list(build_bank(tiny, people, tmp_path / "cut", CONFIG, quiet))) == 2
    whole, cut = read_bank(tmp_path / "whole", tiny), read_bank(tmp_path / "cut", tiny)
    assert list(whole) == list(cut) == list(people.names)
    for name in whole:
        assert torch.equal(whole[name].up, cut[name].up)
        assert whole[name].up.abs().max() > 0
    assert not torch.equal(whole[people.names[0]].up, whole[people.names[1]].up)


def test_progress_counts_whom_it_was_asked_for(tiny: Base, people: People, tmp_path: Path) -> None:
    list(build_bank(tiny, people.first(2), tmp_path, CONFIG, quiet))
    others = replace(people, names=people.names[1:], members=people.members[1:])  # knows one
    shards = list(build_bank(tiny, others, tmp_path, CONFIG, quiet))
    assert [s.total for s in shards] == [3, 4] and len(read_bank(tmp_path, tiny)) == 5


def test_a_bank_of_other_settings_or_another_base(
    tiny: Base, people: People, tmp_path: Path
) -> None:
    list(islice(build_bank(tiny, people, tmp_path, CONFIG, quiet), 1))
    other = BankConfig(steps=3, batch=2, at_once=2)
    with pytest.raises(HdbError, match="was begun with"):
        next(build_bank(tiny, people, tmp_path, other, quiet))
    index = json.loads((tmp_path / "index.json").read_text())
    index["settings"]["base"]["basis"] = "f" * 64
    (tmp_path / "index.json").write_text(json.dumps(index))
    with pytest.raises(HdbError, match="was made for"):
        read_bank(tmp_path, tiny)
    (tmp_path / "index.json").write_text("{}")
    with pytest.raises(HdbError, match="not a bank index"):
        read_bank(tmp_path, tiny)
    with pytest.raises(HdbError, match="hdb train bank"):
        read_bank(tmp_path / "none", tiny)


def test_the_weight_loss_ignores_the_gauge() -> None:
    torch.manual_seed(0)
    bank = Theta(torch.randn(3, 5, 2, 7), torch.randn(3, 5, 6, 2))
    same = Theta(bank.down / -3, bank.up * -3)
    assert weight_loss(same, bank).abs().max() < 1e-4
    other = Theta(torch.randn(3, 5, 2, 7), torch.randn(3, 5, 6, 2))
    exact = ((other.up @ other.down) - (bank.up @ bank.down)).pow(2).sum((1, 2, 3))
    expected = exact / (bank.up @ bank.down).pow(2).sum((1, 2, 3))
    torch.testing.assert_close(weight_loss(other, bank), expected, rtol=1e-4, atol=0)
    nothing = weight_loss(Theta(bank.down, bank.up * 0), bank)
    torch.testing.assert_close(nothing, torch.ones(3))
    cross = ((other.up @ other.down) * (bank.up @ bank.down)).sum((-2, -1))
    torch.testing.assert_close(inner(other, bank), cross, rtol=1e-4, atol=1e-4)


def test_train_with_a_bank(folder: Path, tmp_path: Path) -> None:
    def run(*words: object) -> tuple[int, str]:
        result = hdb(*words)
        return result.exit_code, result.stderr

    bank, out = tmp_path / "bank", tmp_path / "h.safetensors"
    words = "train", "bank", folder, "--out", bank, "--steps", 2, "--at-once", 4
    made = run(*words)
    assert made[0] == 0 and "5/5 people" in made[1], made[1]
    again = told(*words)  # nothing is left to do
    assert again["people"] == 5 and again["path"] == str(bank)
    steps = ("--steps", 2, "--batch", 2)
    used = run("train", "hypernetwork", folder, "--out", out, "--bank", bank, *steps)
    assert used[0] == 0 and out.exists(), used[1]
    for photo in HELD_OUT.glob("900007/*.jpg"):
        shutil.copy(photo, tmp_path / f"stranger-{photo.name}")
    code, error = run("train", "hypernetwork", tmp_path, "--out", out, "--bank", bank, *steps)
    assert code == 1 and "not in the bank" in error
