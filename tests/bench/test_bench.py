"""Benchmarks: what a row promises, how time and memory are taken, and the command."""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from commands import refused, told

from benchmarks import device, train
from benchmarks.derived import spearman
from benchmarks.device import agreement, speeds
from hdbcli.bench.harness import Row, measured, paired, scratch
from hdbcli.bench.suite import BENCHMARKS
from hdbcli.config import RefineConfig
from hdbcli.model.base import Base, load_base
from hdbcli.model.memory import PLANS
from registry import store
from registry.errors import HdbError
from registry.plugins import load_registry
from registry.spec import BaseSpec, SampleSettings
from registry.stable_diffusion.families import FAMILIES


def test_rows_keep_what_they_promise() -> None:
    assert Row("speed", 3.0, "x").kept is None
    assert Row("speed", 3.0, "x", below=3.0).kept and not Row("speed", 3.1, "x", below=3.0).kept
    assert Row("speed", 3.0, "x", above=3.0).kept and not Row("speed", 2.9, "x", above=3.0).kept


@pytest.mark.parametrize(("long", "steps"), [(0.0, 1), (60.0, 3)])
def test_of_long_steps_of_training_one_is_timed(
    long: float, steps: int, tiny: Base, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken = []

    def pretrain(*_: object) -> Iterator[int]:
        for number in range(3):
            time.sleep(0.05)
            taken.append(number)
            yield number

    monkeypatch.setattr(train, "pretrain", pretrain)
    monkeypatch.setattr(train, "LONG", long)
    rows = {row.name.partition(": ")[2]: row.value for row in train.measure(tiny, 2, "tiny", 3e12)}
    seconds = rows["a step"]
    assert len(taken) == steps and seconds >= 0.05 > rows["a step, processors' time"]
    assert rows["reached"] == pytest.approx(3 / seconds)
    assert rows["samples a second"] == pytest.approx(4 / seconds) and rows["peak memory"] > 0.1


@pytest.mark.parametrize("recompute", [True, False])
def test_a_whole_batch_is_its_people(recompute: bool) -> None:
    family = FAMILIES["sd1"]
    each = train.person_flops(family, 64, recompute)
    assert train.step_flops(family, 64, 32, recompute) == pytest.approx(32 * each)
    assert train.step_flops(family, 64, 1, recompute) > 1.5 * each  # somebody is always asked


def test_commands_are_measured_with_their_own_memory() -> None:
    start = time.perf_counter()
    seconds, little = measured([sys.executable, "-c", "import time; time.sleep(0.3)"])
    assert 0.3 < seconds < time.perf_counter() - start
    _, much = measured([sys.executable, "-c", "x = bytearray(300_000_000)"])
    assert 3e8 < much < 6e8 and little < much / 2
    with pytest.raises(HdbError, match="no such thing"):
        measured([sys.executable, "-c", "raise SystemExit('no such thing')"])


def test_pairs_are_a_ratio(monkeypatch: pytest.MonkeyPatch) -> None:
    """The median turn's: a machine that is slow for a while changes nothing."""
    clock = [0.0]
    monkeypatch.setattr("hdbcli.bench.harness.time", SimpleNamespace(perf_counter=lambda: clock[0]))
    slowness = [1, 1, 1, 1, 9, 9, 9, 1]  # of each piece of work, two a turn; the first is unseen

    def work(seconds: float) -> None:
        clock[0] += seconds * slowness.pop(0)

    assert paired(lambda: work(6.0), lambda: work(2.0), rounds=3) == 3 and not slowness


def test_scratch_goes_away_with_its_store(
    hdb_home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ZeroDivisionError), scratch() as folder:
        assert store.root().is_relative_to(folder) and folder.parent == tmp_path
        raise ZeroDivisionError
    assert not folder.exists() and store.root() == hdb_home


def test_spearman_is_the_order() -> None:
    assert spearman(torch.tensor([0.1, 0.2, 5.0, 6.0])) == pytest.approx(1)
    assert spearman(torch.tensor([6.0, 5.0, 0.2, 0.1])) == pytest.approx(-1)
    assert spearman(torch.tensor([1.0, 0.0, 3.0, 2.0])) == pytest.approx(0.6)


def test_derived_identities_are_measured(
    hdb_home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(BaseSpec, "sampling", SampleSettings(steps=6))  # faces are to be found
    monkeypatch.setattr(RefineConfig, "steps", 2)
    monkeypatch.setattr("benchmarks.derived.SEEDS", 2)
    refused("bench", "derived", says="give --people")
    for folder in sorted((Path(__file__).parents[1] / "data/heldout").iterdir())[:2]:
        shutil.copytree(folder, tmp_path / "people" / folder.name)
    rows = {row["name"]: row["value"] for row in _derived(tmp_path / "people")}
    assert 0.9 < rows["likeness as int8 / as float32"] < 1.1
    assert -1 <= rows["the same, lowest"] <= 1 and 0 < rows["likeness of 2 people"] < 1


def _derived(people: Path) -> list[dict[str, Any]]:
    return told("bench", "derived", "--people", people)["rows"]


def test_a_device_is_checked_against_the_cpu(float32_weights: None) -> None:
    rows = agreement("cpu")
    assert len(rows) == 5 and all(row.kept for row in rows)
    steps = speeds(load_registry().get("tiny"), "cpu")
    plans = [plan.name for plan in PLANS for _ in ("a step", "a picture")]
    assert [row.name.split()[2].rstrip(",:") for row in steps] == plans
    assert all(row.value > 0 for row in steps)


def test_a_device_that_computes_otherwise_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = []

    def slightly_off(*words: Any) -> Base:
        base = load_base(*words)
        if not loaded:
            for parameter in base.backbone.components["unet"].parameters():
                parameter.data *= 1.2
        loaded.append(base)
        return base

    monkeypatch.setattr(device, "load_base", slightly_off)
    _, *drawing = agreement("cpu")
    assert len(loaded) == 2 and not any(row.kept for row in drawing)


def test_bench_on_the_command_line(hdb_home: Path) -> None:
    refused("bench", "speed", says=", ".join(BENCHMARKS))
    result = told("bench", "basis")
    (row,) = result["rows"]
    assert "192 targets" in row["name"] and 0 < row["value"] < 20
    assert row["kept"] is (row["value"] <= row["below"]) and row["below"] == 2
    assert result["date"] > "2026" and "cores" in result["machine"]
