"""What a hypernetwork and an identity are judged on: the photo that nothing has read, and pictures
of the right person."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from hdbcli.measure.metrics import FaceMetric, Judges
from hdbcli.measure.score import _drift, score
from hdbcli.measure.statistics import normal_interval
from hdbcli.method.lidb import Theta
from hdbcli.model.base import Base, load_predictor
from hdbcli.model.memory import NORMAL, PLANS, Size, estimate
from hdbcli.model.sample import Picture
from hdbcli.model.tokens import Tokens, own_tokens
from hdbcli.training.evaluate import _parts, evaluate, work_of
from hdbcli.training.people import read_people
from hdbcli.training.personalise import crop_photos, likeness_of
from hdbcli.training.shards import encoded
from registry.spec import BaseSpec, SampleSettings

HELD_OUT = Path(__file__).parents[1] / "data/heldout"
SIZE = Size(344_832, 11_727_792, 1_410_707, 96)


def quiet(*_: object) -> None:
    pass


def test_a_hypernetwork_is_tested_on_the_photo_that_was_not_read(
    tiny: Base, tmp_path: Path, few_pairs: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(BaseSpec, "sampling", SampleSettings(steps=6))
    for folder in sorted(HELD_OUT.iterdir())[:4]:
        shutil.copytree(folder, tmp_path / folder.name)
    read = encoded(tiny, read_people(tmp_path, tiny.spec, "*", False, quiet))
    (a, b), (c, d), *rest = read.members
    mixed = replace(read, members=((a, d), (c, b), *rest))  # two have each other's second photo
    model, _ = load_predictor(tiny)
    learned = [Picture(read.crops[first], 0) for first, *_ in read.members]  # perfect portraits
    monkeypatch.setattr("hdbcli.training.evaluate.generate", lambda *_: learned)
    right, wrong = (evaluate(tiny, model, each, 0, quiet) for each in (read, mixed))
    assert right.own < right.another and right.own != wrong.own
    assert right.other_photo.top1 == 1.0 and wrong.other_photo.top1 == 0.5
    assert right.portraits.top1 == 1.0 and wrong.portraits.top1 == 0.5


def test_as_many_people_go_side_by_side_as_the_plan_allows(tiny: Base) -> None:
    frugal = replace(tiny, plan=PLANS[1])
    whole, parted = ([p.stop for p in _parts(base, 26)] for base in (tiny, frugal))
    assert whole == [25, 50] and parted == list(range(1, 27))
    generous, least = (estimate(SIZE, plan, work_of(tiny.spec, 2)) for plan in (NORMAL, PLANS[2]))
    assert generous > 4 * least and work_of(tiny.spec, 0).exact


def test_the_interval_is_of_a_mean() -> None:
    found = normal_interval(torch.tensor([1.0, 2.0, 3.0, 4.0]))
    assert (found.mean, found.low, found.high) == pytest.approx((2.5, 1.23484, 3.76516), abs=1e-4)


def test_likeness_is_of_the_identity_beside_the_base(
    tiny: Base, astronaut: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (crop,) = crop_photos([astronaut], tiny.spec, None, quiet)
    drawn = {True: [crop.image] * 4, False: [np.ascontiguousarray(crop.image[::-1])] * 4}
    monkeypatch.setattr(
        "hdbcli.measure.score._draw", lambda _, adapter, *__: drawn[adapter is not None]
    )
    like = score(
        tiny, tiny.first_theta(), [crop], Judges({}, {"face": FaceMetric()}), quiet
    ).likeness
    assert like and like.portraits > 0.99 > 0.9 > like.floor
    pictures = {adapter: [Picture(image, 1) for image in row] for adapter, row in drawn.items()}
    monkeypatch.setattr(
        "hdbcli.model.sample.generate", lambda _, adapter, *__: pictures[adapter is not None]
    )
    mine, floor, _ = likeness_of(tiny, tiny.first_theta(), [crop], tiny.faces([crop.image]), quiet)
    assert mine > 0.99 > 0.9 > floor


def test_drift_is_of_pictures_that_the_person_is_not_in(
    tiny: Base, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(BaseSpec, "sampling", SampleSettings(steps=2))
    word = own_tokens(tiny.backbone, tiny.spec.identifier, 1)  # changes nothing without [V]
    noise = torch.randn(word.vectors[0].shape, generator=torch.Generator().manual_seed(0))
    changed = Tokens(word.word, (word.vectors[0] + noise,))
    assert _drift(tiny, changed, quiet) == 0 < _drift(tiny, _theta(tiny), quiet)


def _theta(base: Base) -> Theta:
    first = base.first_theta()
    return replace(first, up=first.up + 0.1)
