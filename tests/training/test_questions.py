"""Questions of several losses: asked in one pass they are what each is alone."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
from identities import LATENT
from torch import Tensor

from hdbcli.method.lidb import Theta
from hdbcli.model.base import Base
from hdbcli.model.memory import MemoryPlan
from hdbcli.training.questions import (
    POSITIONS,
    Question,
    Samples,
    answers,
    ask,
    diffusion,
    distance,
    joined,
    pairs_at_once,
)

PEOPLE = 2


def samples(tiny: Base, seed: int, pairs: int, prompt: str) -> Samples:
    generator = torch.Generator().manual_seed(seed)
    count = pairs * PEOPLE
    clean, noise = torch.randn((2, count, *LATENT), generator=generator)
    return Samples(clean, [tiny.prompt(prompt)] * count, noise, torch.rand(count))


@pytest.fixture
def theta(tiny: Base) -> Theta:
    first = tiny.first_theta(people=PEOPLE)
    generator = torch.Generator().manual_seed(3)
    up = 0.1 * torch.randn(first.up.shape, generator=generator)
    return Theta(first.down.requires_grad_(True), up.requires_grad_(True))


@pytest.fixture
def questions(tiny: Base) -> list[Question]:
    """Two losses that differ in prompts, counts and what they want."""
    portraits = samples(tiny, 0, 2, "a [V] face")
    others = samples(tiny, 1, 1, "a face")
    wanted = torch.randn(others.clean.shape, generator=torch.Generator().manual_seed(2))
    losses = [diffusion(tiny.backbone, portraits), distance(others, wanted)]
    return [losses[0].weighed(0.5), losses[1].weighed(2.0)]


def gradients(
    base: Base, theta: Theta, questions: Sequence[Question]
) -> tuple[int, Tensor, Tensor]:
    theta.up.grad = None
    parts = 0
    value = torch.zeros(())
    for part in ask(base, lambda: theta, questions, "fp32"):
        part.backward()
        parts, value = parts + 1, value + part.detach()
    assert theta.up.grad is not None
    return parts, value, theta.up.grad


def test_together_they_are_what_each_is_alone(
    tiny: Base, theta: Theta, questions: list[Question]
) -> None:
    together = gradients(tiny, theta, questions)
    frugal = replace(tiny, plan=replace(tiny.plan, at_once=1))
    apart = gradients(frugal, theta, questions)
    each = [gradients(tiny, theta, [question]) for question in questions]
    assert together[0] == 1 and apart[0] == len(questions) == 2
    for value, gradient in (together[1:], apart[1:]):
        torch.testing.assert_close(value, each[0][1] + each[1][1], rtol=1e-4, atol=1e-6)
        whole = each[0][2] + each[1][2]
        torch.testing.assert_close(gradient, whole, rtol=1e-3, atol=1e-4 * float(whole.abs().max()))
    assert (each[0][2] - each[1][2]).abs().max() > 0.1 * each[0][2].abs().max()  # they differ


def test_a_pass_holds_as_many_samples_as_the_plan_allows(
    tiny: Base, theta: Theta, questions: list[Question], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    own = type(tiny.backbone).predict

    def predict(self: Any, clean: Tensor, *more: Any) -> Tensor:
        seen.append(len(clean))
        return own(self, clean, *more)

    monkeypatch.setattr(type(tiny.backbone), "predict", predict)
    for at_once, passes in ((None, [10]), (7, [6, 4]), (6, [6, 4]), (1, [4, 2, 4])):
        base = replace(tiny, plan=replace(tiny.plan, at_once=at_once))
        seen.clear()
        with torch.no_grad():
            list(ask(base, lambda: theta, [*questions, questions[0]]))
        assert seen == passes, at_once


def test_answers_in_parts_are_those_of_all_at_once(
    tiny: Base, theta: Theta, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In float32: a CPU with AMX rounds many answers at once to bfloat16, and few not."""
    monkeypatch.setattr("hdbcli.training.questions.autocast", lambda *_, **__: nullcontext())
    asked = joined([samples(tiny, seed, 2, "a [V] face") for seed in range(3)])
    whole, parts = (
        answers(replace(tiny, plan=MemoryPlan("parts", at_once=size)), theta, asked, PEOPLE)
        for size in (None, 4)
    )
    torch.testing.assert_close(parts, whole, rtol=1e-3, atol=1e-3)
    assert (answers(tiny, None, asked) - whole).abs().max() > 0.1


def test_large_latents_are_answered_few_at_once(tiny: Base) -> None:
    small, large = torch.zeros(1, *LATENT), torch.zeros(1, 4, 64, 64)
    assert pairs_at_once(tiny, 1, small) == POSITIONS // 256 and pairs_at_once(tiny, 1, large) == 4
    assert pairs_at_once(tiny, 3, large) == 1 and pairs_at_once(tiny, 9, large) == 1
