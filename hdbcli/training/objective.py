"""What the hypernetwork is trained for, taken from a few people at a time where memory is small:
diffusion loss, preservation of what is nobody's, likeness of what is drawn, distance from a bank.

HyperDreamBooth §3.3, eq. 4; DreamBooth §3.3, prior preservation; and the likeness loss. P people
have DRAWS pictures each; samples lie people fastest, the order in which the layer deals out
identities.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from hdbcli.method.lidb import Theta, inner
from hdbcli.model.base import Base
from hdbcli.model.device import autocast
from hdbcli.training.likeness_loss import likeness_loss

DRAWS = 2  # pictures of a person a step, each with its noise: a prediction costs more than two


class Samples(NamedTuple):
    """What the base is asked to denoise: K pictures for each of P people, people fastest."""

    clean: Tensor  # (K P, c, h, w)
    prompts: Sequence[str]
    noise: Tensor
    t: Tensor  # (K P,)

    def part(self, rows: slice) -> Samples:
        return Samples(self.clean[rows], self.prompts[rows], self.noise[rows], self.t[rows])

    def joined(self, more: Samples) -> Samples:
        """Put more samples behind these, for one pass."""
        return Samples(
            torch.cat([self.clean, more.clean]),
            [*self.prompts, *more.prompts],
            torch.cat([self.noise, more.noise]),
            torch.cat([self.t, more.t]),
        )


class Portraits(NamedTuple):
    """What it is asked to draw for P people, likewise, and what should come of it."""

    prompts: Sequence[str]
    noise: Tensor  # (P DRAWS, c, h, w)
    true: Tensor  # (P DRAWS, 3, S, S)
    traits: Tensor  # (P DRAWS, 128) embeddings of those pictures, mirrored or not


# People, and the part of the loss that comes of their theta.
Job: TypeAlias = tuple[Tensor, Callable[[Theta], Tensor]]


def diffusion_jobs(
    base: Base, samples: Samples, people: int, weight: float, precision: str
) -> list[Job]:
    """Divide the weighted mean diffusion loss among a few people at a time, as the memory plan
    asks."""
    clean, prompts, noise, t = samples

    def loss(some: Tensor, worn: Theta) -> Tensor:
        rows = _rows(some, people)
        base.injected.wear(worn)
        with autocast(base.device, precision):
            theirs = [prompts[row] for row in rows.tolist()]
            losses = base.backbone.loss(clean[rows], theirs, noise[rows], t[rows])
        return weight * losses.sum() / len(clean)

    return [(some, partial(loss, some)) for some in _parts(base, people)]


def prior_jobs(
    base: Base, samples: Samples, people: int, weight: float, precision: str
) -> list[Job]:
    """Divide in the same way how far the answer to prompts that name nobody is from the base's own.

    DreamBooth compares with pictures that the base drew. Its answers themselves say the same
    without their noise.
    """
    clean, prompts, noise, t = samples

    def loss(some: Tensor, worn: Theta) -> Tensor:
        rows = _rows(some, people)
        asked = clean[rows], [prompts[row] for row in rows.tolist()], noise[rows], t[rows]
        base.injected.wear(None)
        with autocast(base.device, precision), torch.no_grad():
            own = base.backbone.predict(*asked)
        base.injected.wear(worn)  # exactly, as everywhere
        with autocast(base.device, precision):
            far = F.mse_loss(base.backbone.predict(*asked), own)
        return weight * far * (len(rows) / len(clean))

    return [(some, partial(loss, some)) for some in _parts(base, people)]


def likeness_jobs(
    base: Base, portraits: Portraits, people: int, weight: float, precision: str
) -> list[Job]:
    """Divide the mean likeness loss in the same way."""
    prompts, noise, true, traits = portraits

    def loss(some: Tensor, worn: Theta) -> Tensor:
        rows = _rows(some, people)
        theirs = [prompts[row] for row in rows.tolist()]
        base.injected.wear(worn)
        far = likeness_loss(base, theirs, noise[rows], true[rows], traits[rows], precision)
        return weight * far.sum() / len(noise)

    return [(some, partial(loss, some)) for some in _parts(base, people)]


def _parts(base: Base, people: int) -> tuple[Tensor, ...]:
    return torch.arange(people).split(max(1, (base.plan.at_once or people * DRAWS) // DRAWS))


def _rows(some: Tensor, people: int) -> Tensor:
    """Return the samples of some of the people, all of whom lie people fastest."""
    return (people * torch.arange(DRAWS)[:, None] + some).flatten()


def spread(theta: Theta, jobs: Sequence[Job]) -> Tensor:
    """Return the sum of the jobs' losses, with its gradient for theta.

    The gradient of each job is taken at once, so that only one job's activations are held.
    """
    leaf = Theta(*(core.detach().requires_grad_(True) for core in (theta.down, theta.up)))
    total = torch.zeros((), device=theta.up.device)
    for some, loss in jobs:
        part = loss(leaf[some])
        part.backward()
        total += part.detach()
    assert leaf.down.grad is not None and leaf.up.grad is not None
    slope = (theta.down * leaf.down.grad).sum() + (theta.up * leaf.up.grad).sum()
    return slope + (total - slope).detach()


def weight_loss(predicted: Theta, bank: Theta) -> Tensor:
    """Return how far each sample's residuals (B,) are from the bank's, as a share of their
    energy."""
    energy = inner(bank, bank).sum(1)
    far = inner(predicted, predicted) - 2 * inner(predicted, bank) + inner(bank, bank)
    return far.sum(1) / energy.clamp(min=1e-12)
