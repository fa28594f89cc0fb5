"""Prior preservation of styles: answers to captions are held to what they were, by distance."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from hdbcli.config import CAPTIONS, RefineConfig
from hdbcli.faces.photo import crop_face
from hdbcli.method.hypernet import Faces
from hdbcli.method.lidb import Factors, Theta
from hdbcli.method.relax import relax
from hdbcli.model.base import Base, load_predictor
from hdbcli.training import style_prior as prior
from hdbcli.training.personalise import settle
from hdbcli.training.refine import lidb_trial, refine, with_likeness
from hdbcli.training.style_prior import style_prior

HELD_OUT = Path(__file__).parents[1] / "data/heldout"
SHAPE = torch.Size((16, 16, 16))  # of tiny's latents


@pytest.fixture(scope="module")
def faces(tiny: Base) -> list[Faces]:
    photos = [folder / "photo-0.jpg" for folder in sorted(HELD_OUT.iterdir())[:2]]
    template = np.array(tiny.spec.template)
    return [tiny.faces([crop_face(p, template, tiny.spec.resolution).image]) for p in photos]


@pytest.fixture(scope="module")
def predicted(tiny: Base, faces: list[Faces]) -> Theta:
    with torch.no_grad():
        return load_predictor(tiny)[0](
            Faces(*(torch.cat(part) for part in zip(*faces, strict=True)))
        )


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def test_nothing_is_lost_before_anything_changes(
    tiny: Base, faces: list[Faces], predicted: Theta
) -> None:
    worn = tiny.injected.factors(predicted)
    loss = style_prior(tiny, worn, 2, SHAPE)
    calm = [float(loss(worn, seeded(), turn)) for turn in range(len(CAPTIONS))]
    assert max(calm) < 1e-4
    for each in worn.up:
        each *= 1.1  # in place, as optimizers do: what was before is kept apart
    moved = [float(loss(worn, seeded(), turn)) for turn in range(len(CAPTIONS))]
    assert min(moved) > 20 * max(calm)
    assert len(set(moved)) == len(CAPTIONS)  # each turn asks another caption
    assert float(loss(worn, seeded(), len(CAPTIONS))) == moved[0]


def test_it_is_the_squared_distance_of_answers(
    tiny: Base, faces: list[Faces], predicted: Theta
) -> None:
    loss = style_prior(tiny, tiny.injected.factors(predicted), 2, SHAPE)
    generator = seeded()
    far = float(loss(tiny.injected.factors(predicted.scaled(0.5)), generator, 2))
    generator = seeded()
    noise = torch.randn((1, *SHAPE), generator=generator)
    t = prior.EARLIEST + (1 - prior.EARLIEST) * torch.rand(1, generator=generator)
    by_hand = 0.0
    for person in range(2):  # each alone
        own = predicted[person : person + 1]
        with torch.no_grad():
            clean = prior._draft(tiny, tiny.injected.factors(own), CAPTIONS[2], 1, SHAPE)
            asked = clean, [tiny.prompt(CAPTIONS[2])], noise, t
            with tiny.wearing(own):
                before = tiny.backbone.predict(*asked)
            with tiny.wearing(own.scaled(0.5)):
                after = tiny.backbone.predict(*asked)
        by_hand += prior.WEIGHT * float((after - before).square().mean())
    assert far == pytest.approx(by_hand, rel=0.05)  # in other number formats


def test_gradients_reach_what_is_worn(tiny: Base, faces: list[Faces], predicted: Theta) -> None:
    factors = tiny.injected.factors(predicted)
    up = tuple(each.clone().requires_grad_(True) for each in factors.up)
    worn = Factors(factors.down, up)
    loss = style_prior(tiny, worn, 2, SHAPE)
    with torch.no_grad():
        for each in up:
            each *= 1.1
    far = loss(worn, seeded(), 0)
    far.backward()
    assert float(far.detach()) > 1e-3 and all(each.grad is not None for each in up)


def test_styles_of_nobody_are_not_held(tiny: Base, faces: list[Faces], predicted: Theta) -> None:
    def lost(worn: Theta, somebody: bool) -> float:
        trial = with_likeness(tiny, lidb_trial(tiny, worn), faces, 1.0, somebody)
        assert trial.beside
        return float(trial.beside(predicted, seeded(), 2, 0).detach())

    first = tiny.first_theta(people=2)
    assert lost(first, True) > lost(first, False) + 0.01 > 0.01
    assert lost(predicted, True) == pytest.approx(lost(predicted, False), abs=1e-3)
    alone = replace(tiny, spec=replace(tiny.spec, hypernetwork=None))
    for base, goes_on, somebody in (
        (tiny, False, True),
        (alone, False, False),
        (alone, True, True),
    ):
        assert settle(base, 1, 1, 0, "adamw", None, goes_on).somebody == somebody


def test_refinement_keeps_styles(
    tiny: Base, faces: list[Faces], predicted: Theta, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = relax(predicted, 2)
    latents = [tiny.backbone.encode_images(each.crops) for each in faces]
    judge = style_prior(tiny, tiny.injected.factors(start), 2, SHAPE)

    def lost(weight: float) -> tuple[float, Tensor]:
        monkeypatch.setattr(prior, "WEIGHT", weight)
        config = RefineConfig(steps=10, rank=2, optimizer="adamw")
        now = refine(tiny, start, latents, config, lambda *_: None, faces).theta
        monkeypatch.setattr(prior, "WEIGHT", 1.0)
        with torch.no_grad():
            far = sum(
                float(judge(tiny.injected.factors(now), seeded(), turn))
                for turn in range(len(CAPTIONS))
            )
        return far, now.up

    with_prior, held = lost(5.0)
    without, free = lost(0.0)
    assert with_prior < 0.8 * without
    assert not torch.equal(held, start.up) and not torch.equal(held, free)
