"""Prior preservation: answers to other prompts are held to what they were, by distance."""

from __future__ import annotations

import itertools
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from identities import LATENT
from torch import Tensor

from hdbcli.config import CAPTIONS, RefineConfig
from hdbcli.faces.photo import crop_face
from hdbcli.method.algebra import relax
from hdbcli.method.hypernet import Faces
from hdbcli.method.lidb import Factors, Theta
from hdbcli.model.base import Base, load_predictor
from hdbcli.training import preservation as prior
from hdbcli.training.personalise import settle
from hdbcli.training.preservation import preservation
from hdbcli.training.questions import Question, ask
from hdbcli.training.refine import refine

HELD_OUT = Path(__file__).parents[1] / "data/heldout"


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


def far(base: Base, adapter: Theta | Factors, question: Question) -> float:
    (part,) = ask(base, lambda: adapter, [question])
    return float(part.detach())


def photos(tiny: Base, faces: list[Faces]) -> Tensor:
    return torch.cat([each.latents for each in faces])


def test_nothing_is_lost_before_anything_changes(
    tiny: Base, faces: list[Faces], predicted: Theta, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In float32: many answers at once are rounded to bfloat16 where one alone is not."""
    monkeypatch.setattr("hdbcli.training.questions.autocast", lambda *_, **__: nullcontext())
    adapter = tiny.injected.factors(predicted)
    losses = preservation(tiny, adapter, photos(tiny, faces), True, 0.0)
    turns = prior.turns_of(True)
    held_ones = [prompt for prompt, held in turns if held]
    assert sorted(held_ones) == sorted(2 * CAPTIONS)
    assert all(one != other for one, other in itertools.pairwise(held_ones))
    unnamed_ones = [prompt for prompt, held in turns if not held]
    assert unnamed_ones[0] == "a face" and len(set(unnamed_ones)) == len(unnamed_ones) == 6
    assert not any("[V]" in prompt for prompt in unnamed_ones)
    styles = [turn for turn, (_, held) in enumerate(turns) if held]
    calm = [far(tiny, adapter, losses(turn)) for turn in styles]
    assert max(calm) < 1e-4
    for each in adapter.up:
        each *= 1.1  # in place, as optimizers do: what was before is kept apart
    moved = [far(tiny, adapter, losses(turn)) for turn in styles]
    assert min(moved) > 20 * max(calm)
    assert len(set(moved)) == 2 * len(CAPTIONS)  # each turn asks another picture
    again, later = (losses(styles[0] + more).samples for more in (0, len(turns)))
    assert torch.equal(again.clean, later.clean), "a picture is drawn once"
    assert not torch.equal(again.noise, later.noise), "and seen under other noise in each round"


def test_others_stay_as_the_base_draws_them(
    tiny: Base, faces: list[Faces], predicted: Theta
) -> None:
    """Prompts without [V] are held to the base itself, whatever it starts from."""
    first = tiny.injected.factors(tiny.first_theta(people=2))
    person = tiny.injected.factors(predicted)
    for start, predicted_one in ((first, False), (person, True)):
        losses = preservation(tiny, start, photos(tiny, faces), predicted_one, 0.0)
        calm, moved = (far(tiny, each, losses(0)) for each in (first, person))
        assert calm < 1e-4 < 20 * calm + 1e-3 < moved


def test_it_is_the_squared_distance_of_answers(
    tiny: Base, faces: list[Faces], predicted: Theta
) -> None:
    turns = prior.turns_of(True)
    start = tiny.injected.factors(predicted)
    losses = preservation(tiny, start, photos(tiny, faces), True, 0.6)
    for turn in (0, 5):  # one of the class, one of a style
        prompt, held = turns[turn]
        found = far(tiny, predicted.scaled(0.5), losses(turn))
        generator = torch.Generator().manual_seed(turn)
        noise = torch.randn((1, *LATENT), generator=generator)
        u = torch.rand(1, generator=generator)
        t = 4 * u / (1 + 3 * u)  # most of it in much noise
        by_hand = 0.0
        for person in range(2):  # each alone
            own = predicted[person : person + 1]
            adapter = tiny.injected.factors(own) if held else None
            with torch.no_grad():
                (clean,) = prior._drawn(tiny, adapter, [prompt], faces[person].latents, [turn])
                asked = clean, [tiny.prompt(prompt)], noise, t
                with tiny.adapted(own if held else None):
                    before = tiny.backbone.predict(*asked)
                with tiny.adapted(own.scaled(0.5)):
                    after = tiny.backbone.predict(*asked)
            by_hand += (8.0 if held else 2.0) * float((after - before).square().mean())
        assert found == pytest.approx(by_hand, rel=0.05)  # in other number formats


def test_gradients_reach_the_adapter(tiny: Base, faces: list[Faces], predicted: Theta) -> None:
    factors = tiny.injected.factors(predicted)
    up = tuple(each.clone().requires_grad_(True) for each in factors.up)
    adapter = Factors(factors.down, up)
    losses = preservation(tiny, adapter, photos(tiny, faces), True, 0.0)
    with torch.no_grad():
        for each in up:
            each *= 1.1
    (part,) = ask(tiny, lambda: adapter, [losses(1)])
    part.backward()
    assert float(part.detach()) > 3e-4  # before anything changed it is under 1e-4
    assert all(each.grad is not None for each in up)


def test_styles_are_held_where_there_is_a_prediction(tiny: Base) -> None:
    alone = replace(tiny, spec=replace(tiny.spec, hypernetwork=None))
    for base, goes_on, predicted in (
        (tiny, False, True),
        (alone, False, False),
        (alone, True, True),
    ):
        assert settle(base, 1, 1, 0, "adamw", None, goes_on).predicted == predicted
    assert not any(held for _, held in prior.turns_of(False))


def test_refinement_keeps_styles_and_others(
    tiny: Base, faces: list[Faces], predicted: Theta, monkeypatch: pytest.MonkeyPatch
) -> None:
    start, alone = relax(predicted[:1], 2), faces[:1]
    judge = preservation(tiny, tiny.injected.factors(start), alone[0].latents, True, 0.0)
    others, asked = (0, 3), (1, 2)
    turns = prior.turns_of(True)
    assert all(turns[turn][1] for turn in asked) and not any(turns[turn][1] for turn in others)

    def lost(weight: float) -> tuple[float, float]:
        monkeypatch.setattr(prior, "WEIGHT", weight)
        config = RefineConfig(steps=5, rank=2, optimizer="adamw", likeness=0.0)
        now = refine(tiny, start, [alone[0].latents], config, lambda *_: None, alone).theta
        assert not torch.equal(now.up, start.up)
        monkeypatch.setattr(prior, "WEIGHT", 1.0)
        with torch.no_grad():
            factors = tiny.injected.factors(now)
            found = {turn: far(tiny, factors, judge(turn)) for turn in (*others, *asked)}
        return sum(found[k] for k in others), sum(found[k] for k in asked)

    (mine, styles), (theirs, lost_styles) = lost(5.0), lost(0.0)
    assert styles < 0.85 * lost_styles
    assert mine < theirs  # most of what is left is the prediction's own
