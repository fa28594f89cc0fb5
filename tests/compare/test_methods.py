"""Which methods are compared, by which rate, with whose pictures."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from records import ALONE, judge, record

from hdbcli.compare.comparison import RATES, Comparison, Limits, _bounds, tuned
from hdbcli.compare.methods import METHODS, Method, choose, lidb, suited
from hdbcli.compare.page import notes, tables
from hdbcli.compare.results import result_of
from hdbcli.compare.run import new_setup, run_method
from hdbcli.compare.timing import time_alone
from hdbcli.config import (
    DIFFUSION_LR,
    PROMPTS,
    UNPREDICTED_LR,
    UNPREDICTED_STEPS,
    RefineConfig,
    unnamed,
)
from hdbcli.measure.metrics import FaceMetric, Judges
from hdbcli.measure.statistics import Interval
from hdbcli.model.base import Base, load_predictor
from hdbcli.training.hypernetwork import new_hypernetwork
from hdbcli.training.people import People
from hdbcli.training.personalise import crop_photos
from hdbcli.training.refine import train
from registry.errors import HdbError
from registry.spec import BaseSpec, SampleSettings

HELD_OUT = Path(__file__).parents[1] / "data/heldout"


def quiet(*_: object) -> None:
    pass


class Brightness:
    """Score pictures by how much brighter they are than photos."""

    def score(self, pictures: Sequence[np.ndarray], references: Sequence[Any]) -> list[list[float]]:
        return [[float(one.mean() - two.mean()) for two in references] for one in pictures]


@pytest.fixture(scope="module")
def two(tiny: Base) -> People:
    photos = [HELD_OUT / name / f"photo-{k}.jpg" for name in ("900000", "900001") for k in range(2)]
    crops = [crop.image for crop in crop_photos(photos, tiny.spec, None, quiet)]
    return People(np.stack(crops), ("a", "b"), ((0, 1), (2, 3)), styled=((), ()))


def test_prompts_of_other_people_do_not_name_the_person() -> None:
    assert unnamed("a [V] face with bark skin") == "a face with bark skin"
    assert unnamed("an oil painting of [V]") == "an oil painting of"
    assert unnamed("[V], smiling, and [V]'s hat") == ", smiling, and 's hat"


def test_tuning_takes_the_rate_that_ends_most_alike(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    truth = torch.randn(4, 128, generator=torch.Generator().manual_seed(0))
    (lora,) = choose(["lora"])
    ends = (0.9, 0.8, 0.2, 0.7, 0.95)  # how far from the person, by rate
    setup = SimpleNamespace(truth={"face": truth}, recognisers={"face": FaceMetric()})
    away = {lora.lr * rate: end for rate, end in zip(RATES, ends, strict=True)}
    monkeypatch.setattr("hdbcli.compare.comparison.new_setup", lambda *_: setup)
    monkeypatch.setattr(
        "hdbcli.compare.comparison.run_method", lambda _, each, __: record(truth, away[each.lr])
    )
    (chosen,) = tuned(None, None, None, [lora], tmp_path, None, quiet)  # type: ignore[arg-type]
    assert chosen.lr == lora.lr * RATES[2]


def test_methods_get_what_hdb_new_would_give_them(tiny: Base) -> None:
    assert [suited(each, tiny) for each in METHODS.values()] == list(METHODS.values())
    plain = replace(tiny, spec=replace(tiny.spec, likeness=0.0))
    for name in ("hyperdreambooth", "free-relaxation"):
        assert suited(METHODS[name], plain).lr == DIFFUSION_LR
    alone = replace(tiny, spec=replace(tiny.spec, hypernetwork=None, budget=20_000))
    scratch = suited(METHODS["no-hypernetwork"], alone)
    assert (scratch.steps, scratch.lr) == (UNPREDICTED_STEPS, UNPREDICTED_LR)
    assert scratch.rank < 4
    assert suited(METHODS["no-hypernetwork"], alone, 3).steps == 3
    for name in ("lora", "dreambooth", "inversion"):
        assert suited(METHODS[name], alone) == METHODS[name]


def test_few_people_go_side_by_side_where_pictures_are_large() -> None:
    lora, dreambooth = METHODS["lora"], METHODS["dreambooth"]
    assert [lora.at_once(side) for side in (128, 256, 512, 1024)] == [25, 6, 1, 1]
    assert dreambooth.at_once(128) == 1


def test_a_timing_that_the_system_ends_is_told(astronaut: Path) -> None:
    with pytest.raises(HdbError, match="timed lora was ended by the system"):
        time_alone(METHODS["lora"], partial(os._exit, 9), np.zeros((8, 8, 3), np.uint8), 1)


def test_records_rest_on_what_predicted_and_on_the_loss(
    tiny: Base, two: People, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    kept: list[str] = []
    monkeypatch.setattr("hdbcli.compare.run._plain", lambda *_: None)
    monkeypatch.setattr("hdbcli.compare.run._group", lambda *words: kept.append(words[3].name))
    monkeypatch.setattr("hdbcli.compare.run._joined", lambda groups: groups)
    for version, seed, weight in (("1", 0, 1), ("1", 1, 1), ("2", 1, 1), ("2", 1, 2)):
        monkeypatch.setattr("hdbcli.compare.run.__version__", version)
        monkeypatch.setattr("hdbcli.training.preservation.WEIGHT", weight)
        setup = new_setup(tiny, new_hypernetwork(tiny, seed), two, Judges(), None, quiet)
        for name in ("one-pass", "lora"):
            run_method(setup, METHODS[name], tmp_path)
    one, lora, other, same, later, newer, held, without = kept
    assert one != other and lora == same and later not in kept[:4] and newer not in kept[:4]
    assert held not in kept[:6] and without == newer  # LoRA has no such loss
    monkeypatch.setattr("hdbcli.training.preservation.turns_of", lambda _: [("a face", False)])
    run_method(setup, METHODS["one-pass"], tmp_path)
    assert kept[-1] not in kept[:-1]  # nor are prompts held in other turns taken for the same


def test_records_rest_on_where_steps_lie_and_where_likeness_looks(
    tiny: Base, two: People, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    kept: list[str] = []
    monkeypatch.setattr("hdbcli.compare.run._plain", lambda *_: None)
    monkeypatch.setattr("hdbcli.compare.run._group", lambda *words: kept.append(words[3].name))
    monkeypatch.setattr("hdbcli.compare.run._joined", lambda groups: groups)
    model = new_hypernetwork(tiny, 0)
    for shift, moment in ((4.0, "5"), (4.0, "5"), (3.0, "5"), (3.0, "4")):
        monkeypatch.setattr("hdbcli.compare.run.EARLY", moment)
        base = replace(tiny, backbone=replace(tiny.backbone, shift=shift))
        setup = new_setup(base, model, two, Judges(), None, quiet)
        for name in ("one-pass", "lora"):
            run_method(setup, METHODS[name], tmp_path)
    assert kept[:2] == kept[2:4]  # the control: the same again is read
    assert not {*kept[4:6]} & {*kept[:4]} and kept[6] not in kept[:6]
    assert kept[7] == kept[5]  # LoRA has no likeness loss


def test_each_person_is_compared_with_their_own_pictures(
    tiny: Base, two: People, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(BaseSpec, "sampling", SampleSettings(steps=2))
    monkeypatch.setattr(Method, "at_once", lambda *_: 1)
    monkeypatch.setattr("hdbcli.compare.run.DRAWINGS", 1)  # of which pictures are kept
    plain = replace(METHODS["no-hypernetwork"], steps=0)  # theta_0 is the base
    judges = Judges({}, {"face": FaceMetric(), "bright": Brightness()})
    setup = new_setup(tiny, new_hypernetwork(tiny, 0), two, judges, None, quiet)
    for _ in range(2):  # learned, and read again
        found = run_method(setup, plain, tmp_path)
        assert found.drift.max() < 0.5 and list(found.persons) == ["bright"]
        drawn, photos = found.pictures[0].float(), np.stack(setup.photos).astype(float)
        near = drawn.mean((1, 2, 3)) - torch.from_numpy(photos.mean((1, 2, 3))).float()
        torch.testing.assert_close(found.persons["bright"], near, rtol=0, atol=1e-2)
    assert np.abs(setup.plain[:2].astype(float) - setup.plain[2:]).mean() > 5  # the control
    pairs = np.stack([each for given in setup.given for each in (given, 255 - given)])
    _, limits = _bounds(replace(setup, plain=pairs))
    assert limits["face"].floor == limits["face"].photo  # the first of each pair is the portrait


def test_ablations_differ_from_hdb_new_in_what_they_say() -> None:
    full, new = METHODS["hyperdreambooth"], RefineConfig()
    fields = ("steps", "rank", "lr", "optimizer", "likeness")
    assert [getattr(full, f) for f in fields] == [getattr(new, f) for f in fields]
    assert full.predicted and full.iterations is None and full.trains is lidb
    own = vars(full)
    differs = {
        name: {k for k in own if getattr(METHODS[name], k) != own[k]} - {"name", "summary"}
        for name in list(METHODS)[1:7]
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
    with METHODS["one-pass"].prepared(tiny, model, faces, quiet) as trainable:
        up = trainable.adapter().up[..., :1]  # type: ignore[union-attr]
    assert torch.equal(up, model.predict(faces[0], 1).up)
    assert not torch.equal(up, model.predict(faces[0]).up)


def test_a_line_says_bytes_and_memory() -> None:
    truth = torch.randn(9, 128, generator=torch.Generator().manual_seed(0))
    first = result_of(METHODS["lora"], record(truth, 0.25), ALONE, [judge(truth)], None)
    same = Interval(0.5, 0.4, 0.6)
    comparison = Comparison(
        9, "here", False, (first,), 1400, {"face": Limits(same, same, same, None, None)}, ()
    )
    line = ("lora", "9", "40", "0.001", "21.0 s", "5.0 s", "1,000 MB", "14")
    line = (*line, "0.750", "1.000", "2.0")  # no intervals: all people are alike
    assert next(tables(comparison)).rows == (line,)
    assert "1,400 bytes, 100 times what the 7 numbers" in notes(comparison)[1]


@pytest.mark.parametrize("name", ["lora", "dreambooth"])
def test_a_fair_baseline_has_every_loss_and_a_plain_one_its_own(
    name: str, tiny: Base, two: People
) -> None:
    faces = [tiny.faces([two.crops[0]])]
    before = tiny.injected.weights_digest()
    for each in (name, f"{name}-all"):
        method = replace(METHODS[each], class_pictures=min(6, METHODS[each].class_pictures))
        assert method.at_once(128) == (25 if each == "lora" else 1)
        with method.prepared(tiny, None, faces, quiet) as trainable:
            kept = trainable.prior and trainable.prior(torch.Generator().manual_seed(0), 40)
            asked = set(kept.prompts) if kept else set()
            latents = [tiny.backbone.encode_images(faces[0].crops)]
            config = RefineConfig(2, lr=1e-5, batch=4, optimizer="adamw")
            losses = [step.loss for step in train(tiny, trainable, latents, config)]
            assert len(losses) == 2 and np.isfinite(losses).all()
        wanted = {unnamed(prompt) for prompt in PROMPTS} if each.endswith("-all") else {"a face"}
        assert asked == (set() if each == "lora" else wanted)
        assert (trainable.more_questions is not None) == each.endswith("-all")
    assert tiny.injected.weights_digest() == before
