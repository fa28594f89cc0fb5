"""Who competes, by which rate, against whose pictures: a comparison compares what it says."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from records import ALONE, record

from hdbcli.base import Base, load_predictor
from hdbcli.compare import compete, new_arena
from hdbcli.config import RefineConfig
from hdbcli.contenders import CONTENDERS, Contender, choose, entered
from hdbcli.contest import RATES, Contest, _bounds, tuned
from hdbcli.contest_page import notes, tables
from hdbcli.create import crop_photos
from hdbcli.evaluate import Interval
from hdbcli.people import People
from hdbcli.pretrain import new_hypernetwork
from hdbcli.standings import stand
from registry.spec import SampleSettings

HELD_OUT = Path(__file__).parent / "data/heldout"


def quiet(*_: object) -> None:
    pass


@pytest.fixture(scope="module")
def two(tiny: Base) -> People:
    photos = [HELD_OUT / name / f"photo-{k}.jpg" for name in ("900000", "900001") for k in range(2)]
    crops = [crop.image for crop in crop_photos(photos, tiny.spec, None, quiet)]
    return People(np.stack(crops), ("a", "b"), ((0, 1), (2, 3)), styled=((), ()))


def test_tuning_takes_the_rate_that_ends_most_alike(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    truth = torch.randn(4, 128, generator=torch.Generator().manual_seed(0))
    (lora,) = choose(["lora"])
    ends = (0.9, 0.8, 0.2, 0.7, 0.95)  # how far from the person, by rate
    away = {lora.lr * rate: (1 - end, end) for rate, end in zip(RATES, ends, strict=True)}
    monkeypatch.setattr("hdbcli.contest.new_arena", lambda *_: SimpleNamespace(truth=truth))
    monkeypatch.setattr("hdbcli.contest.compete", lambda _, each, __: record(truth, away[each.lr]))
    (chosen,) = tuned(None, None, None, [lora], tmp_path, None, quiet)  # type: ignore[arg-type]
    assert chosen.lr == lora.lr * RATES[2]


def test_records_rest_on_what_predicted_and_on_the_loss(
    tiny: Base, two: People, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    kept: list[str] = []
    monkeypatch.setattr("hdbcli.compare._plain", lambda *_: None)
    monkeypatch.setattr("hdbcli.compare._group", lambda *words: kept.append(words[3].name))
    monkeypatch.setattr("hdbcli.compare._joined", lambda groups: groups)
    for version, seed, weight in (("1", 0, 1), ("1", 1, 1), ("2", 1, 1), ("2", 1, 2)):
        monkeypatch.setattr("hdbcli.compare.__version__", version)
        monkeypatch.setattr("hdbcli.style_prior.WEIGHT", weight)
        arena = new_arena(tiny, new_hypernetwork(tiny, seed), two, {}, None, quiet)
        for name in ("one-pass", "lora"):
            compete(arena, CONTENDERS[name], tmp_path)
    one, lora, other, same, later, newer, held, without = kept
    assert one != other and lora == same and later not in kept[:4] and newer not in kept[:4]
    assert held not in kept[:6] and without == newer  # LoRA has no such loss


def test_everybody_is_held_against_their_own_pictures(
    tiny: Base, two: People, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("hdbcli.compare.SampleSettings", partial(SampleSettings, steps=2))
    monkeypatch.setattr(Contender, "at_once", 1)
    nobody = replace(CONTENDERS["no-hypernetwork"], steps=0)  # theta_0 is the base
    arena = new_arena(tiny, new_hypernetwork(tiny, 0), two, {}, None, quiet)
    assert compete(arena, nobody, tmp_path).drift.max() < 0.5
    assert np.abs(arena.plain[:2].astype(float) - arena.plain[2:]).mean() > 5  # the control
    pairs = np.stack([each for given in arena.given for each in (given, 255 - given)])
    floor, _, photo, *_ = _bounds(replace(arena, plain=pairs))
    assert floor == photo  # the first of each pair is the portrait


def test_ablations_differ_from_hdb_new_in_what_they_say() -> None:
    full, new = CONTENDERS["hyperdreambooth"], RefineConfig()
    fields = ("steps", "rank", "lr", "optimizer", "likeness")
    assert [getattr(full, f) for f in fields] == [getattr(new, f) for f in fields]
    assert full.predicted and full.iterations is None and full.trains == "lidb"
    own = vars(full)
    differs = {
        name: {k for k in own if getattr(CONTENDERS[name], k) != own[k]} - {"name", "summary"}
        for name in list(CONTENDERS)[1:7]
    }
    assert differs == {
        "no-hypernetwork": {"lr", "predicted"},
        "hypernetwork-only": {"steps", "lr", "rank"},
        "one-pass": {"iterations"},
        "no-relaxation": {"rank"},
        "no-likeness": {"lr", "likeness"},
        "free-relaxation": {"trains"},
    }


def test_one_pass_is_one_pass(tiny: Base, two: People) -> None:
    faces, model = [tiny.faces([two.crops[0]])], load_predictor(tiny)[0]
    with entered(CONTENDERS["one-pass"], tiny, model, faces, quiet) as trial:
        up = trial.worn().up[..., :1]  # type: ignore[union-attr]
    assert torch.equal(up, model.predict(faces[0], 1).up)
    assert not torch.equal(up, model.predict(faces[0]).up)


def test_a_line_says_bytes_and_memory() -> None:
    truth = torch.randn(9, 128, generator=torch.Generator().manual_seed(0))
    first = stand("a", record(truth, (0.8, 0.5, 0.25)), ALONE, truth, None)
    same = Interval(0.5, 0.4, 0.6)
    contest = Contest(9, "here", False, (first,), 1400, same, same, same, None, None, ())
    flat = tuple(f"{v:.3f} ({v:.3f} to {v:.3f})" for v in (0.75, 1, 2))
    line = ("a", "9", "40", "21.0 s", "5.0 s", "1,000 MB", "14", *flat)
    assert next(tables(contest)).rows == (line,)
    assert "1,400 bytes, 100 times what the 7 numbers" in notes(contest)[1]
