"""The comparison: what is judged from records is right, and the whole run goes on where it was."""

from __future__ import annotations

import json
import shlex
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from commands import hdb, told
from PIL import Image
from records import ALONE, record

from hdbcli.compare.comparison import RATES, Contest
from hdbcli.compare.methods import CONTENDERS, choose
from hdbcli.compare.page import tables
from hdbcli.compare.results import reached, stand
from hdbcli.compare.run import marks_of
from hdbcli.compare.timing import Alone
from hdbcli.config import CAPTIONS, MAIN_METHODS, METHODS
from hdbcli.errors import HdbError
from hdbcli.measure.statistics import Interval, bootstrap, likeness_of
from hdbcli.model.base import Base
from hdbcli.model.contact_sheet import LINE, NAME
from registry.spec import BaseSpec, SampleSettings

HELD_OUT = Path(__file__).parents[1] / "data/heldout"
a, b = (replace(CONTENDERS["lora"], name=name) for name in "ab")


def test_a_standing_is_what_the_record_says() -> None:
    truth = torch.randn(9, 128, generator=torch.Generator().manual_seed(0))
    best = record(truth, (0.8, 0.5, 0.25))
    first = stand(a, best, ALONE, truth, None)
    means = {key: interval.mean for key, interval in first.measured.items()}
    assert means == pytest.approx({"likeness": 0.75, "fidelity (t)": 1.0, "drift": 2.0}, abs=1e-5)
    assert first.less_than_first == {} and first.seconds == 1 + 40 * 0.5
    own = [seconds for _, seconds, _ in first.curve]
    assert first.seconds_to_first == pytest.approx(own, abs=1e-3) and own == [1, 6, 21]
    assert first.alone.seconds(1200) == 601 and first.lr == a.lr
    slow = replace(ALONE, first=(5.0, 3.0))  # is not the pace of all
    assert [slow.seconds(steps) for steps in (0, 1, 2, 4)] == [1, 6, 9, 10]
    assert first.portraits is not None and first.portraits.top1 == 1.0
    assert first.named == {"t": (1.0,) * 6}
    assert [round(interval.mean, 4) for *_, interval in first.curve] == [0.2, 0.5, 0.75]
    worse = replace(best, portraits=best.portraits[[0, 1, 1]], texts={"t": best.texts["t"].flip(2)})
    second = stand(b, worse, ALONE, truth, best)
    assert second.seconds_to_first[:2] == pytest.approx(own[:2], abs=1e-3)
    assert second.seconds_to_first[2] is None and second.named == {"t": (0.0,) * 6}
    paired = second.less_than_first["likeness"]
    assert paired.low > 0.2 and paired.mean == pytest.approx(0.25, abs=1e-5)
    fidelity = second.less_than_first["fidelity (t)"]
    assert fidelity.mean == pytest.approx(1.0) and second.less_than_first["drift"].mean == 0


def test_methods_that_learned_fewer_people_are_judged_on_those() -> None:
    truth = torch.randn(9, 128, generator=torch.Generator().manual_seed(0))
    many, few = record(truth, (0.8, 0.5, 0.25)), record(truth[:3], (0.8, 0.5))
    assert likeness_of(few.portraits[-1], truth).shape == (3,)
    for first, second in ((many, few), (few, many)):
        line = stand(a, first, ALONE, truth, None)
        other = stand(b, second, ALONE, truth, first)
        paired = other.less_than_first["likeness"]
        gap = 0.25 if first is many else -0.25
        assert paired.mean == pytest.approx(gap, abs=1e-5)
        assert {line.people, other.people} == {3, 9}
        assert other.portraits is not None and other.portraits.top1 == 1.0
    twin = torch.cat([truth[:5], truth[:1], truth[6:]])  # of somebody who was not learned
    line = stand(a, few, ALONE, twin, None)
    assert line.portraits is not None and line.portraits.top1 == pytest.approx(2 / 3)


def test_seconds_are_held_against_the_first_methods() -> None:
    truth = torch.randn(9, 128, generator=torch.Generator().manual_seed(0))
    best, worse = record(truth, (0.8, 0.5, 0.25)), record(truth, (0.8, 0.8, 0.5))
    slow = replace(ALONE, prepare=0.0, step=5.0)
    first, second = stand(a, best, ALONE, truth, None), stand(b, worse, slow, truth, best)
    same, none = Interval(0.5, 0.4, 0.6), None
    contest = Contest(9, "here", False, (first, second), none, same, same, same, none, none, ())
    (speeds,) = (table for table in tables(contest) if table.title.startswith("Seconds"))
    assert speeds.rows == (
        ("0: 0.200", "1.0 s (1.0 x)", "0 s (0 x)"),
        ("10: 0.500", "6.0 s (1.0 x)", "200 s (33.3 x)"),
        ("40: 0.750", "21.0 s (1.0 x)", "never"),
        ("1,200 steps", "-", "6,000 s (286 x)"),
        ("5,000 steps", "-", "25,000 s (1,190 x)"),
    )
    alone = tables(replace(contest, standings=(first,)))
    assert not any(table.title.startswith("Seconds") for table in alone)


def test_reached_goes_straight_between_points() -> None:
    assert reached([1, 3, 5], [0.0, 0.4, 0.6], 0.2) == 2
    assert reached([1, 3, 5], [0.3, 0.4, 0.6], 0.2) == 1
    assert reached([1, 3, 5], [0.0, 0.4, 0.6], 0.61) is None


def test_bootstrap_covers_the_mean_and_knows_noise_from_none() -> None:
    generator = torch.Generator().manual_seed(1)
    inside = 0
    for _ in range(200):
        interval = bootstrap(torch.randn(50, generator=generator) + 3)
        inside += interval.low < 3 < interval.high
    assert 0.87 < inside / 200 < 0.99
    flat = bootstrap(torch.full((50,), 3.0))
    assert flat.low == flat.high == 3


def test_marks_halve_down_from_the_end() -> None:
    assert marks_of(40) == [0, 1, 2, 5, 10, 20, 40]
    assert marks_of(0) == [0] and marks_of(5000)[-3:] == [1250, 2500, 5000]


def test_methods_are_those_of_the_help() -> None:
    assert tuple(CONTENDERS) == METHODS and set(MAIN_METHODS.split(",")) <= set(METHODS)
    assert [c.steps for c in choose(["lora", "hyperdreambooth"], 50)] == [50, 40]
    assert [c.people for c in choose(["lora:12", "dreambooth"])] == [12, None]
    for bad in ("lora:0", "lora:few", "lora:-1"):
        with pytest.raises(HdbError, match="asks for no number of people"):
            choose([bad])
    with pytest.raises(HdbError, match="unknown method 'dreambot'"):
        choose(["lora", "dreambot"])


def run(*words: object) -> dict:
    return told("compare", *words)


def test_compare_from_photos_to_sheet(
    tiny: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(BaseSpec, "sampling", SampleSettings(steps=6))
    for folder in sorted(HELD_OUT.iterdir())[:3]:
        shutil.copytree(folder, tmp_path / "people" / folder.name)
    shutil.copytree(HELD_OUT / "900050", tmp_path / "others/900050")
    for person in (tmp_path / "people").iterdir():  # any picture will do for a true one
        for style in ("pixar", "rockstar"):
            true = tmp_path / "truth" / person.name / f"{style}-0.png"
            true.parent.mkdir(parents=True, exist_ok=True)
            Image.open(person / "photo-1.jpg").save(true)
    words = [tmp_path / "people", "--people", 2, "--steps", 2, "--batch", 4, "-o", tmp_path / "out"]
    words += ["--truth", tmp_path / "truth"]
    document = run(*words, "--tune", tmp_path / "others", "--methods", "hypernetwork-only,lora:1")
    assert document["people"] == 2
    only, lora = document["standings"]
    assert only["steps"] == 0 and lora["steps"] == 2 and lora["numbers"] > only["numbers"] > 0
    mine, other = only["alone"], lora["alone"]
    assert other["step"] > 0 == mine["step"] and min(only["seconds"], lora["seconds"]) > 0
    assert len(other["first"]) == 15 and lora["seconds"] == pytest.approx(
        other["prepare"] + sum(other["first"][:2])
    )
    assert min(mine["memory"], other["memory"]) > 1e8
    assert only["less_than_first"] == {} and lora["less_than_first"]["likeness"]["mean"]
    assert [s["prompt"] for s in document["styles"]] == [CAPTIONS[1], CAPTIONS[3]]
    for style in document["styles"]:
        true, through = style["true"], style["through"]
        assert true["portraits"]["top1"] == 1.0 == true["found"] == through["found"]
        assert true["portraits"]["auc"] >= through["portraits"]["auc"] > 0.5
    assert 0 < document["floor"]["mean"] < document["photo"]["mean"] < 1
    assert Image.open(tmp_path / "out/sheet.png").size == (NAME + 6 * 128, 6 + 3 * LINE + 3 * 128)
    assert Image.open(tmp_path / "out/curves.png").size[0] == 800
    assert json.loads((tmp_path / "out/compare.json").read_text()) == document
    assert document["through"]["auc"] > 0 and document["other_photo"]["top1"] == 1.0
    assert 1e7 < document["checkpoint"] < 1e8
    assert document["command"] == shlex.join(["hdb", *sys.argv[1:]])
    page = (tmp_path / "out/compare.md").read_text()
    assert f"| lora | 1 | 2 | {lora['lr']:g} | " in page and "(sheet.png)" in page
    assert "hypernetwork-only (2) | lora (1)" in page
    # Timed for real once, above.
    monkeypatch.setattr(
        "hdbcli.compare.comparison.time_alone", lambda *_: Alone(1.0, 0.1, (), 0.1, 10**9)
    )
    kept = {file: file.stat().st_mtime_ns for file in (tmp_path / "out/records").iterdir()}
    tried = list((tmp_path / "out/tuning").iterdir())
    assert len(kept) == 2 and len(tried) == 1 + len(RATES)  # the prediction has none
    again = run(*words, "--tune", tmp_path / "others", "--methods", "hypernetwork-only,lora:1")
    assert [file.stat().st_mtime_ns for file in kept] == list(kept.values())  # nothing done twice
    assert again["standings"][1]["measured"] == lora["measured"]
    fewer = run(*words[:1], "--people", 1, *words[3:], "--methods", "hypernetwork-only")
    assert fewer["people"] == 1  # another arena: its records are its own
    (tmp_path / "truth/900001/pixar-0.png").unlink()
    result = hdb("compare", *words, "--methods", "lora")
    assert result.exit_code == 1 and "900001 has no true picture of" in result.stderr
    shutil.rmtree(tmp_path / "truth")
    result = hdb("compare", *words, "--methods", "lora")
    assert result.exit_code == 1 and "truth has no PERSON/STYLE-*.png" in result.stderr


def test_a_base_without_a_hypernetwork_compares_what_needs_none(
    tiny: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "hdbcli.model.base.customised", lambda spec: replace(spec, hypernetwork=None)
    )
    monkeypatch.setattr(BaseSpec, "sampling", SampleSettings(steps=2))
    monkeypatch.setattr(
        "hdbcli.compare.comparison.time_alone", lambda *_: Alone(1.0, 0.1, (), 0.1, 10**9)
    )
    words = [HELD_OUT / "900000", "--steps", 1, "-o", tmp_path / "out", "--methods"]
    document = run(*words, "no-hypernetwork,lora")
    assert [s["steps"] for s in document["standings"]] == [1, 1]
    result = hdb("compare", *words, "lora,one-pass")
    assert result.exit_code == 1 and "tiny has no hypernetwork" in result.stderr


def test_compare_says_what_is_wrong(tmp_path: Path) -> None:
    for words, says in (
        (["--methods", "magic"], "unknown method 'magic'"),
        (["-o", __file__], "is a file; give a folder"),
        ([], "does not exist"),
    ):
        result = hdb("compare", tmp_path / "nobody", *words)
        assert result.exit_code == 1 and says in result.stderr
    assert not list(tmp_path.iterdir())
