"""What the hypernetwork is trained for, taken from a few people at a time where memory is small:
diffusion loss, prior preservation, likeness of what is drawn, distance from a bank.

HyperDreamBooth §3.3, eq. 4; DreamBooth §3.3, prior preservation; and the likeness loss. P
people have DRAWS pictures each; samples lie people fastest, the order in which the layer deals
out identities.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from hdbcli.method.lidb import Theta, inner
from hdbcli.model.base import Base
from hdbcli.training import likeness_loss, questions
from hdbcli.training.questions import Question, Samples

DRAWS = 2  # pictures of a person a step, each with its noise: a prediction costs more than two


class Portraits(NamedTuple):
    """What it is asked to draw for P people, likewise, and what should come of it."""

    prompts: Sequence[str]
    noise: Tensor  # (P DRAWS, c, h, w)
    true: Tensor  # (P DRAWS, 3, S, S)
    coloured: Tensor  # (P DRAWS,) whose colours tell who it is, and are compared


def diffusion(
    base: Base, theta: Theta, samples: Samples, weight: float, precision: str
) -> Iterator[Tensor]:
    """Yield the weighted mean diffusion loss, of as many people at a time as the memory
    plan allows."""
    for some, rows in _parts(base, theta):
        question = questions.diffusion(base.backbone, samples.part(rows))
        yield from _asked(base, theta[some], question, weight / len(samples.clean), precision)


def prior(
    base: Base, theta: Theta, samples: Samples, weight: float, precision: str
) -> Iterator[Tensor]:
    """Yield, likewise, how far the answer to prompts that do not name the person is from the base's
    own: weight * mean || v(x_t, c; theta) - v(x_t, c) ||^2.

    DreamBooth compares with pictures that the base drew. Its answers themselves say the same
    without their noise.
    """
    for some, rows in _parts(base, theta):
        part = samples.part(rows)
        own = questions.answers(base, None, part, precision=precision)
        question = questions.distance(part, own)
        yield from _asked(base, theta[some], question, weight / len(samples.clean), precision)


def likeness(
    base: Base, theta: Theta, portraits: Portraits, weight: float, precision: str
) -> Iterator[Tensor]:
    """Yield, likewise, the weighted mean likeness loss."""
    prompts, noise, true, coloured = portraits
    for some, rows in _parts(base, theta):
        theirs = [prompts[row] for row in rows]
        with base.injected.adapted(theta[some]):
            question = likeness_loss.likeness(
                base, theirs, noise[rows], true[rows], precision, coloured[rows]
            )
        yield from _asked(base, theta[some], question, weight / len(noise), precision)


def _asked(
    base: Base, theta: Theta, question: Question, weight: float, precision: str
) -> Iterator[Tensor]:
    yield from questions.ask(base, lambda: theta, [question.weighed(weight)], precision)


def _parts(base: Base, theta: Theta) -> Iterator[tuple[Tensor, list[int]]]:
    """Yield some people after the other, as many as the memory plan allows, and their samples, all
    of which lie people fastest."""
    people = len(theta)
    size = max(1, (base.plan.at_once or people * DRAWS) // DRAWS)
    for some in torch.arange(people).split(size):
        yield some, (people * torch.arange(DRAWS)[:, None] + some).flatten().tolist()


def weight_loss(predicted: Theta, bank: Theta) -> Tensor:
    """Return how far each sample's residuals (B,) are from the bank's, as a share of
    their energy."""
    energy = inner(bank, bank).sum(1)
    far = inner(predicted, predicted) - 2 * inner(predicted, bank) + inner(bank, bank)
    return far.sum(1) / energy.clamp(min=1e-12)
