"""What losses ask the base and what they make of its answers, so that all of a step are asked in
one pass: with `tiny` on a CPU a pass of four samples takes half the time of four passes.

P people lie fastest in every question, the order in which the layer deals out identities.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from hdbcli.model.base import Adapter, Base
from hdbcli.model.device import autocast
from registry.spec import Backbone

POSITIONS = 16_384  # of latents, answered at once: 64 samples of 16 x 16, 4 of 64 x 64


class Samples(NamedTuple):
    """What the base is asked to denoise: K pictures for each of P people, people fastest."""

    clean: Tensor  # (K P, c, h, w)
    prompts: Sequence[str]
    noise: Tensor
    t: Tensor  # (K P,)

    def part(self, rows: slice | Sequence[int]) -> Samples:
        chosen = range(len(self.clean))[rows] if isinstance(rows, slice) else rows
        prompts = [self.prompts[row] for row in chosen]
        return Samples(self.clean[rows], prompts, self.noise[rows], self.t[rows])


class Question(NamedTuple):
    """Samples, and the loss (K P,) or (), which is summed, of what the network answers (K P, c, h,
    w)."""

    samples: Samples
    loss: Callable[[Tensor], Tensor]

    def weighed(self, weight: float) -> Question:
        return Question(self.samples, lambda answer: weight * self.loss(answer).sum())

    def answered(self, backbone: Backbone) -> Tensor:
        """Return the loss, as the backbone is adapted now."""
        return self.loss(backbone.predict(*self.samples))


def distance(samples: Samples, wanted: Tensor) -> Question:
    """Ask how far the answers are from those wanted: || v(x_t, c) - wanted ||^2 (K P,), the mean
    over the numbers of a sample."""
    return Question(samples, lambda answer: (answer - wanted).square().mean((1, 2, 3)))


def diffusion(backbone: Backbone, samples: Samples) -> Question:
    """Ask for the diffusion loss (K P,): the distance from the true answers."""
    return distance(samples, backbone.target(samples.clean, samples.noise, samples.t))


def diffusion_loss(
    backbone: Backbone, latents: Tensor, prompts: Sequence[str], noise: Tensor, t: Tensor
) -> Tensor:
    """Return the diffusion loss of each sample (B,), as the backbone is adapted now."""
    return diffusion(backbone, Samples(latents, prompts, noise, t)).answered(backbone)


def joined(parts: Sequence[Samples]) -> Samples:
    """Put samples behind each other, for one pass."""
    clean, prompts, noise, t = zip(*parts, strict=True)
    asked = [prompt for each in prompts for prompt in each]
    return Samples(torch.cat(clean), asked, torch.cat(noise), torch.cat(t))


def ask(
    base: Base,
    adapter: Callable[[], Adapter | None],
    questions: Iterable[Question],
    precision: str = "auto",
) -> Iterator[Tensor]:
    """Yield the summed loss of some questions after the other, as many in a pass as the memory plan
    allows samples: all, or one by one. Each pass asks for the adapter anew, with its graph."""
    for some in _together(list(questions), base.plan.at_once):
        samples = joined([question.samples for question in some])
        with base.adapted(adapter()), base.short_attention(samples.clean, precision):
            with autocast(base.device, precision, samples.clean):
                answer = base.backbone.predict(*samples)
            theirs = answer.split([len(question.samples.clean) for question in some])
            yield sum(
                (each.loss(own).sum() for each, own in zip(some, theirs, strict=True)),
                torch.zeros((), device=answer.device),
            )


@torch.no_grad()
def answers(
    base: Base,
    adapter: Adapter | None,
    samples: Samples,
    people: int = 1,
    precision: str = "auto",
) -> Tensor:
    """Return what the base answers (K P, c, h, w), as many samples at once as the memory plan and
    POSITIONS allow."""
    size = people * pairs_at_once(base, people, samples.clean)
    with base.adapted(adapter), autocast(base.device, precision, samples.clean[:size]):
        parts = (samples.part(slice(r, r + size)) for r in range(0, len(samples.clean), size))
        return torch.cat([base.backbone.predict(*part) for part in parts])


def pairs_at_once(base: Base, people: int, latents: Tensor) -> int:
    """Return how many samples of each of P people go in one pass that keeps no gradient."""
    fit = POSITIONS // latents[0, 0].numel()
    return max(1, min(fit, base.plan.at_once or fit) // people)


def _together(questions: Sequence[Question], at_once: int | None) -> Iterator[list[Question]]:
    """Yield questions in groups of at most `at_once` samples, or of one question."""
    group: list[Question] = []
    for question in questions:
        size = sum(len(each.samples.clean) for each in (*group, question))
        if group and at_once and size > at_once:
            yield group
            group = []
        group.append(question)
    if group:
        yield group
