"""The comparison: what is judged from records is right, and the whole run goes on where it was."""

from __future__ import annotations

import json
import shlex
import shutil
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from commands import hdb, told
from PIL import Image
from records import ALONE, OFF, judge, record

from hdbcli.compare.comparison import RATES, Comparison, Limits
from hdbcli.compare.methods import METHODS, choose
from hdbcli.compare.page import tables
from hdbcli.compare.results import reached, result_of
from hdbcli.compare.timing import Alone, Rounds, time_alone
from hdbcli.config import CAPTIONS, MAIN_METHODS, METHOD_NAMES
from hdbcli.measure.statistics import Interval, bootstrap, find
from hdbcli.model.base import Base
from hdbcli.model.contact_sheet import LINE, NAME
from registry.errors import HdbError
from registry.spec import BaseSpec, SampleSettings

HELD_OUT = Path(__file__).parents[1] / "data/heldout"
a, b = (replace(METHODS["lora"], name=name) for name in "ab")


def people(count: int = 9) -> torch.Tensor:
    return torch.randn(count, 128, generator=torch.Generator().manual_seed(0))


def test_a_result_is_what_the_record_says() -> None:
    truth = people()
    judges, best = [judge(truth)], record(truth, 0.25)
    first = result_of(a, best, ALONE, judges, None)
    means = {key: interval.mean for key, interval in first.measured.items()}
    assert means == pytest.approx({"likeness": 0.75, "fidelity (t)": 1.0, "drift": 2.0}, abs=1e-5)
    assert first.less_than_first == {} and first.seconds == 1 + 40 * 0.5
    assert first.alone.seconds(1200) == 601 and first.lr == a.lr
    slow = replace(ALONE, first=(5.0, 3.0))  # is not the pace of all
    assert [slow.seconds(steps) for steps in (0, 1, 2, 4)] == [1, 6, 9, 10]
    assert first.portraits["face"].first == Interval(1.0, 1.0, 1.0)
    assert first.named == {"t": (1.0,) * 6} and first.found == (1.0,) * 6
    assert first.way["face"].mean == pytest.approx((0.75 - 0.2) / (0.9 - 0.2), abs=1e-5)
    worse = replace(record(truth, 0.5), texts={"t": best.texts["t"].flip(3)})
    second = result_of(b, worse, ALONE, judges, best)
    assert second.named == {"t": (0.0,) * 6}
    paired = second.less_than_first["likeness"]
    assert paired.low > 0.2 and paired.mean == pytest.approx(0.25, abs=1e-5)
    fidelity = second.less_than_first["fidelity (t)"]
    assert fidelity.mean == pytest.approx(1.0) and second.less_than_first["drift"].mean == 0


def test_a_portrait_without_a_face_is_a_miss_of_one_drawing() -> None:
    truth = people()
    lost = record(truth, 0.25)
    lost.faces["face"][0, 3, 1] = torch.nan
    told = result_of(a, lost, ALONE, [judge(truth)], None)
    # one of 18 portraits counts 0 instead of 1 - 0.3, and finds no one
    assert told.measured["likeness"].mean == pytest.approx(0.75 - 0.7 / 18, abs=1e-5)
    assert told.portraits["face"].first.mean == pytest.approx(17 / 18)
    assert told.portraits["face"].first.low < 17 / 18 < told.portraits["face"].first.high


def test_styles_together_ask_for_the_name_and_the_person_of_the_same_picture() -> None:
    truth = people(12)
    half = record(truth, 0.25)
    half.texts["t"][1, :6] = half.texts["t"][2, :6]  # six people's selfies look like Pixar
    half.faces["face"][1, 3:9] = half.faces["face"][1, 3:9].flip(0)  # six have another's face
    told = result_of(a, half, ALONE, [judge(truth)], None)
    assert told.named["t"][1] == 0.5
    five = told.styled["face"][0].five.mean
    assert told.styled["face"][0].first.mean == 0.5 <= five < 1
    # three are named wrong only, three both, three have another's face only, three are right
    _, at_five = find(half.faces["face"][1], truth)
    wanted = (at_five.mean(1) * (torch.arange(12) >= 6)).mean()
    assert told.together["face"][0].mean == pytest.approx(float(wanted)) and wanted < 0.5
    assert told.together["face"][1].mean == 1.0  # the next caption is as it was


def test_methods_that_learned_fewer_people_are_judged_on_those() -> None:
    truth = people()
    judges = [judge(truth)]
    many, few = record(truth, 0.25), record(truth[:3], 0.5)
    for first, second in ((many, few), (few, many)):
        line = result_of(a, first, ALONE, judges, None)
        other = result_of(b, second, ALONE, judges, first)
        paired = other.less_than_first["likeness"]
        gap = 0.25 if first is many else -0.25
        assert paired.mean == pytest.approx(gap, abs=1e-5)
        assert {line.people, other.people} == {3, 9}
        assert other.portraits["face"].first.mean == 1.0
    twin = torch.cat([truth[:5], truth[:1], truth[6:]])  # of a person who was not learned
    line = result_of(a, few, ALONE, [judge(twin)], None)
    assert line.portraits["face"].first.mean == pytest.approx(2 / 3)


def test_groups_of_people_are_told_apart() -> None:
    truth = people(9)
    served = record(truth, 0.25)
    served.faces["face"][0, 6:] += 0.35 * OFF  # three people come out as the base's own
    words = ("light",) * 4 + ("medium",) * 2 + ("dark",) * 3
    line = result_of(a, served, ALONE, [judge(truth)], None, {"complexion": words})
    assert {group: count for group, (count, _) in line.grouped.items()} == {
        "complexion: dark": 3,
        "complexion: light": 4,
        "complexion: medium": 2,
    }
    ways = {group: way.mean for group, (_, way) in line.grouped.items()}
    assert ways["complexion: light"] == pytest.approx(0.55 / 0.7, abs=1e-5)
    assert ways["complexion: dark"] == pytest.approx(0.20 / 0.7, abs=1e-5)
    same = Interval(0.5, 0.4, 0.6)
    limits = {"face": Limits(same, same, same, None, None)}
    comparison = Comparison(9, "here", False, (line,), None, limits, ())
    (told,) = (table for table in tables(comparison) if "group by group" in table.title)
    assert [row[1] for row in told.rows] == ["complexion: dark", "complexion: light"]


def test_seconds_are_read_from_finished_schedules() -> None:
    truth = people()
    judges, best = [judge(truth)], record(truth, 0.25)
    slow = replace(ALONE, prepare=0.0, step=5.0)
    first = result_of(a, best, ALONE, judges, None)
    short, long = (
        result_of(b.of_steps(steps), record(truth, away, steps), slow, judges, best)
        for steps, away in ((100, 0.5), (300, 0.1))
    )
    assert {short.family, long.family} == {"b"} and short.name == "b@100"
    same = Interval(0.5, 0.4, 0.6)
    limits = {"face": Limits(same, same, same, None, None)}
    comparison = Comparison(9, "here", False, (first, short, long), None, limits, ())
    (speeds,) = (table for table in tables(comparison) if table.title.startswith("Seconds"))
    middle = 500 + (0.75 - 0.5) / (0.9 - 0.5) * 1000  # on the line between the two
    assert speeds.heads == ("likeness, by", "a", "b")
    assert speeds.rows == (
        ("0.750, face", "21.0 s (1.0 x)", f"{middle:,.0f} s ({middle / 21:.1f} x)"),
        ("1,200 steps", "-", "6,000 s (286 x)"),
        ("5,000 steps", "-", "25,000 s (1,190 x)"),
    )
    (speeds,) = (
        table
        for table in tables(replace(comparison, results=(first, short)))
        if table.title.startswith("Seconds")
    )
    assert speeds.rows[0][2] == "never"  # whatever a longer schedule would have reached
    alone = tables(replace(comparison, results=(first,)))
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


def test_methods_are_those_of_the_help() -> None:
    assert tuple(METHODS) == METHOD_NAMES and set(MAIN_METHODS.split(",")) <= set(METHODS)
    assert [c.steps for c in choose(["lora", "hyperdreambooth"], 50)] == [50, 40]
    assert [c.people for c in choose(["lora:12", "dreambooth"])] == [12, None]
    for bad in ("lora:0", "lora:few", "lora:-1"):
        with pytest.raises(HdbError, match="NAME:PEOPLE"):
            choose([bad])
    short, most, own = choose(["dreambooth@40:3", "dreambooth@1000", "lora@77"])
    assert (short.name, short.steps, short.people, short.lr) == ("dreambooth@40", 40, 3, 3e-4)
    assert most.lr == METHODS["dreambooth"].lr and most.family == "dreambooth"
    assert own.steps == 77 and own.lr == METHODS["lora"].lr
    for bad in ("lora@", "lora@0", "lora@x", "hypernetwork-only@40"):
        with pytest.raises(HdbError, match="NAME@STEPS"):
            choose([bad])
    with pytest.raises(HdbError, match="unknown method 'dreambot'"):
        choose(["lora", "dreambot"])


def run(*words: object) -> dict:
    return told("compare", *words)


def test_compare_from_photos_to_sheet(
    tiny: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(BaseSpec, "sampling", SampleSettings(steps=2))
    monkeypatch.setattr("hdbcli.compare.run.DRAWINGS", 1)
    monkeypatch.setattr("hdbcli.compare.comparison.RATES", RATES[-1:])
    quick = partial(time_alone, rounds=Rounds(warm_up=1, timed=3))
    monkeypatch.setattr("hdbcli.compare.comparison.time_alone", quick)
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
    only, lora = document["results"]
    assert only["steps"] == 0 and lora["steps"] == 2 and lora["numbers"] > only["numbers"] > 0
    mine, other = only["alone"], lora["alone"]
    assert other["step"] > 0 == mine["step"] and min(only["seconds"], lora["seconds"]) > 0
    assert len(other["first"]) == 4 and lora["seconds"] == pytest.approx(
        other["prepare"] + sum(other["first"][:2])
    )
    assert min(mine["memory"], other["memory"]) > 1e8
    assert lora["way"]["face"]["mean"] < 1 and only["together"]["face"]
    assert only["less_than_first"] == {} and lora["less_than_first"]["likeness"]["mean"]
    assert [s["prompt"] for s in document["styles"]] == [CAPTIONS[1], CAPTIONS[3]]
    for style in document["styles"]:
        true, through = style["true"], style["through"]
        faces = [each["portraits"]["face"] for each in (true, through)]
        assert faces[0]["first"]["mean"] == 1.0 == true["found"] == through["found"]
        assert faces[0]["auc"]["mean"] >= faces[1]["auc"]["mean"] > 0.5
        assert 0 <= true["together"]["face"]["mean"] <= 1
    limits = document["limits"]["face"]
    assert 0 < limits["floor"]["mean"] < limits["photo"]["mean"] < 1
    assert Image.open(tmp_path / "out/sheet.png").size == (NAME + 6 * 128, 6 + 3 * LINE + 3 * 128)
    assert Image.open(tmp_path / "out/curves.png").size[0] == 800
    more = ("files", "settings", "seconds")
    saved = {name: value for name, value in document.items() if name not in more}
    assert json.loads((tmp_path / "out/compare.json").read_text()) == saved
    assert limits["through"]["auc"]["mean"] > 0 and limits["other_photo"]["first"]["mean"] == 1.0
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
    assert len(kept) == len(tried) == 2
    again = run(*words, "--tune", tmp_path / "others", "--methods", "hypernetwork-only,lora:1")
    assert [file.stat().st_mtime_ns for file in kept] == list(kept.values())  # nothing done twice
    assert again["results"][1]["measured"] == lora["measured"]
    fewer = run(*words[:1], "--people", 1, *words[3:], "--methods", "hypernetwork-only")
    assert fewer["people"] == 1  # another setup: its records are its own
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
        "registry.plugins.customised", lambda spec: replace(spec, hypernetwork=None)
    )
    monkeypatch.setattr(BaseSpec, "sampling", SampleSettings(steps=2))
    monkeypatch.setattr("hdbcli.compare.run.DRAWINGS", 1)
    monkeypatch.setattr(
        "hdbcli.compare.comparison.time_alone", lambda *_: Alone(1.0, 0.1, (), 0.1, 10**9)
    )
    words = [HELD_OUT / "900000", "--steps", 1, "-o", tmp_path / "out", "--methods"]
    document = run(*words, "no-hypernetwork,lora")
    assert [s["steps"] for s in document["results"]] == [1, 1]
    result = hdb("compare", *words, "lora,one-pass")
    assert result.exit_code == 1 and "tiny has no hypernetwork" in result.stderr


def test_compare_says_what_is_wrong(tmp_path: Path) -> None:
    for words, says in (
        (["--methods", "magic"], "unknown method 'magic'"),
        (["-o", __file__], "is a file; give a folder"),
        ([], "does not exist"),
    ):
        result = hdb("compare", tmp_path / "missing", *words)
        assert result.exit_code == 1 + ("magic" in says) and says in result.stderr
    assert not list(tmp_path.iterdir())
