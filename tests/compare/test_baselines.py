"""The methods beside LiDB: each starts as the base, learns, and leaves the base as it was."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from hdbcli.compare.baselines import (
    class_prior,
    trainable_dreambooth,
    trainable_inversion,
    trainable_lora,
)
from hdbcli.config import PORTRAIT, RefineConfig
from hdbcli.faces.photo import crop_face
from hdbcli.model.base import Base
from hdbcli.model.sample import generate
from hdbcli.model.tokens import Tokens, own_tokens
from hdbcli.training.refine import AVERAGE, Trainable, portrait_loss, train, trainable_lidb
from registry.errors import HdbError
from registry.spec import SampleSettings

HELD_OUT = Path(__file__).parents[1] / "data/heldout"
CONFIG = RefineConfig(steps=6, batch=4, optimizer="adamw")
STEPS = {"inversion": 20}  # a word moves slowly
LR = {"lidb": 5e-3, "lora": 3e-3, "inversion": 0.03, "dreambooth": 3e-4}


def quiet(stage: str, done: int, total: int) -> None: ...


@pytest.fixture(scope="module")
def latents(tiny: Base) -> list[Tensor]:
    """Encode one photo of each of two held-out people."""
    template = np.array(tiny.spec.template)
    photos = (HELD_OUT / f"{seed}/photo-0.jpg" for seed in (900000, 900003))
    crops = [crop_face(photo, template, tiny.spec.resolution).image for photo in photos]
    return [tiny.backbone.encode_images(tiny.images([crop])) for crop in crops]


@contextmanager
def trainable_of(method: str, base: Base, people: int) -> Iterator[Trainable]:
    if method == "dreambooth":
        with trainable_dreambooth(base, class_prior(base, 2, ["a face"], quiet)) as trainable:
            yield trainable
    elif method == "lidb":
        yield trainable_lidb(base, base.first_theta(people=people))
    else:
        yield {
            "lora": lambda: trainable_lora(base, people, 2),
            "inversion": lambda: trainable_inversion(base, people),
        }[method]()


def run(base: Base, trainable: Trainable, latents: list[Tensor], method: str, steps: int) -> Tensor:
    optimizer = torch.optim.AdamW(trainable.parameters.values())
    for _ in train(
        base,
        trainable,
        latents,
        replace(CONFIG, lr=LR[method], steps=steps),
        optimizer,
    ):
        pass
    return portrait_loss(base, trainable.adapter(), latents)


@pytest.mark.parametrize("method", list(LR))
def test_each_method_starts_as_the_base_and_learns(
    method: str, tiny: Base, latents: list[Tensor]
) -> None:
    one = latents[:1]
    before = portrait_loss(tiny, None, one)
    weights = {k: v.clone() for k, v in tiny.backbone.components["unet"].state_dict().items()}
    with trainable_of(method, tiny, 1) as trainable:
        torch.testing.assert_close(portrait_loss(tiny, trainable.adapter(), one), before)
        assert trainable.numbers == sum(p.numel() for p in trainable.parameters.values())
        after = run(tiny, trainable, one, method, STEPS.get(method, CONFIG.steps))
        assert after < before - 5e-4
        optimizer = torch.optim.AdamW(trainable.parameters.values())
        with pytest.raises(HdbError, match="1 people are trained, on photos of 2"):
            next(train(tiny, trainable, latents, CONFIG, optimizer))
    assert torch.equal(portrait_loss(tiny, None, one), before)
    for name, tensor in tiny.backbone.components["unet"].state_dict().items():
        assert torch.equal(tensor, weights[name])
    left = list(tiny.backbone.components["unet"].parameters())
    assert not any(p.requires_grad or p.grad is not None for p in left)


def numbers(trainable: Trainable) -> Tensor:
    """Return what a trainable has learned so far, a row a person."""
    return torch.cat([p.detach().flatten(1) for p in trainable.parameters.values()], 1)


@pytest.mark.parametrize("method", ["lora", "inversion"])
def test_people_side_by_side_learn_as_if_alone(
    method: str, tiny: Base, latents: list[Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As those of LiDB do, whose test is that of refinement. In float32: in bfloat16 Adam turns the
    last bit of a gradient near 0 into a whole step."""
    monkeypatch.setattr("hdbcli.training.questions.autocast", lambda *_, **__: nullcontext())
    with trainable_of(method, tiny, 2) as both:
        start = numbers(both)
        run(tiny, both, latents, method, 3)
        together = numbers(both) - start
    for i in range(2):
        with trainable_of(method, tiny, 1) as one:
            run(tiny, one, latents[i : i + 1], method, 3)
            alone = (numbers(one) - start[i : i + 1])[0]
        assert alone.abs().mean() > 1e-3, "it learned"
        assert (together[i] - alone).abs().mean() < 0.02 * alone.abs().mean()
        assert (together[1 - i] - alone).abs().mean() > 0.2 * alone.abs().mean()  # the control


def test_every_photo_of_a_person_is_learned_from(tiny: Base, latents: list[Tensor]) -> None:
    """Also where there are more of them than samples in a step."""
    generator = torch.Generator().manual_seed(0)
    own = torch.cat([latents[0], latents[1], latents[0].flip(-1)])
    other = own.clone()
    other[2] = torch.randn(own[2].shape, generator=generator)

    def learned(photos: Tensor, steps: int) -> Tensor:
        trainable = trainable_lidb(tiny, tiny.first_theta())
        for _ in train(tiny, trainable, [photos], replace(CONFIG, batch=2, steps=steps)):
            pass
        return numbers(trainable)

    assert torch.equal(learned(own, 1), learned(other, 1))  # photos 1 and 2: the control
    assert not torch.equal(learned(own, 2), learned(other, 2))  # 2 and 3


def test_a_lidb_ends_as_the_moving_average_of_its_iterations(
    tiny: Base, latents: list[Tensor]
) -> None:
    """What it trains is the same; the last iteration alone is the control."""

    def rows(average: float) -> list[Tensor]:
        trainable = replace(trainable_lidb(tiny, tiny.first_theta()), average=average)
        found = [numbers(trainable).clone()]
        for _ in train(tiny, trainable, latents[:1], replace(CONFIG, steps=4, lr=5e-3)):
            found.append(numbers(trainable).clone())
        return found

    plain, kept = rows(0.0), rows(AVERAGE)
    assert all(torch.equal(mine, own) for mine, own in zip(kept[1:-1], plain[1:-1], strict=True))
    wanted = plain[0]
    for number, row in enumerate(plain[1:]):
        wanted = torch.lerp(row, wanted, min(AVERAGE, (number + 1) / (number + 10)))
    assert torch.allclose(kept[-1], wanted, atol=1e-6)
    assert (plain[-1] - wanted).abs().mean() > 1e-4


def test_relaxation_outside_the_basis_starts_where_the_prediction_is(
    tiny: Base, latents: list[Tensor]
) -> None:
    theta = tiny.first_theta()
    theta.up.normal_(generator=torch.Generator().manual_seed(0), std=0.3)
    trainable = trainable_lora(tiny, 1, 2, beneath=theta)
    predicted = portrait_loss(tiny, theta, latents[:1])
    torch.testing.assert_close(portrait_loss(tiny, trainable.adapter(), latents[:1]), predicted)
    assert abs(float(predicted - portrait_loss(tiny, None, latents[:1]))) > 1e-4


def test_each_sample_reads_its_own_word(tiny: Base) -> None:
    tokens = own_tokens(tiny.backbone, tiny.spec.identifier, 2)
    settings = SampleSettings(steps=2)

    def draw(adapter: Tokens | None, seeds: list[int], prompt: str = PORTRAIT) -> np.ndarray:
        return np.stack([p.image for p in generate(tiny, adapter, prompt, seeds, settings, quiet)])

    assert (draw(tokens, [3, 3]) == draw(None, [3, 3])).all()  # its own meaning changes nothing
    noise = torch.randn(tokens.vectors[0].shape, generator=torch.Generator().manual_seed(0))
    changed = Tokens(tokens.word, (tokens.vectors[0] + noise,))
    both = draw(changed, [3, 3]).astype(int)
    assert abs(both[0] - both[1]).max() > 1
    for i in range(2):
        assert abs(draw(changed[[i]], [3])[0].astype(int) - both[i]).max() <= 1
    assert (draw(changed, [3, 3], "a face") == draw(None, [3, 3], "a face")).all()  # no [V]
    with pytest.raises(HdbError, match="tokens of this model"):
        tiny.backbone.token_embeddings("face face")


def test_the_prior_of_dreambooth_joins_the_batch_and_is_as_large(
    tiny: Base, latents: list[Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[dict[str, int]] = []
    own = type(tiny.backbone).predict

    def predict(self: Any, clean: Tensor, prompts: list[str], *more: Tensor) -> Tensor:
        assert len(clean) == len(prompts)
        seen.append(dict(Counter(prompts)))
        return own(self, clean, prompts, *more)

    with trainable_of("dreambooth", tiny, 1) as trainable:
        monkeypatch.setattr(type(tiny.backbone), "predict", predict)
        optimizer = torch.optim.SGD(trainable.parameters.values(), lr=0)
        next(train(tiny, trainable, latents[:1], replace(CONFIG, batch=3), optimizer))
        thrifty = replace(tiny, plan=replace(tiny.plan, at_once=2))
        next(train(thrifty, trainable, latents[:1], replace(CONFIG, batch=2), optimizer))
    assert seen == [{"a sks face": 3, "a face": 3}] + 2 * [{"a sks face": 1, "a face": 1}]
