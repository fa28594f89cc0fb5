"""Draw pictures in a few steps by what a base answers, so that training can learn from them.

DDIM's deterministic steps (Song et al. 2021, eq. 12), or fresh noise in every step where the base's
own scheduler renews it, as that of consistency models does. Gradients pass through the last step
alone: what lies before it changes the picture as much, but its gradient adds nothing but seconds
(Clark et al. 2024, DRaFT-1).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hdbcli.training.questions import Samples, joined
from registry.spec import Drafting, passes_of

NOISIEST = 1 - 2**-20  # of times: float32 rounds what lies closer up to 1, where no timestep is


@torch.no_grad()
def before_last(
    backbone: Drafting,
    prompts: Sequence[str],
    noise: Tensor,
    steps: int,
    guidance: float,
    taken: int | None = None,
) -> Samples:
    """Take all steps but the last, from noise (B, c, h, w), or but the last of those `taken`, and
    return what that one asks: B samples, or twice as many with guidance, "" first."""
    clean, rest = torch.zeros_like(noise), noise
    times = backbone.times(steps).clamp(max=NOISIEST).to(noise)
    for number, t in enumerate(times[: taken or steps], 1):
        samples = Samples(clean, prompts, rest, t.expand(len(noise)))
        if passes_of(guidance) == 2:
            samples = joined([samples._replace(prompts=[""] * len(noise)), samples])
        if number < (taken or steps):
            clean, rest = _split(backbone, samples, backbone.predict(*samples), guidance)
            rest = noise.roll(number, 1) if backbone.renews else rest
    return samples


def picture(backbone: Drafting, last: Samples, answer: Tensor, guidance: float) -> Tensor:
    """Return the latents (B, c, h, w) that the network holds for the picture when it answers the
    last step."""
    return _split(backbone, last, answer, guidance)[0]


def draft(
    backbone: Drafting, prompts: Sequence[str], noise: Tensor, steps: int, guidance: float
) -> Tensor:
    """Draw latents (B, c, h, w) in a few steps from noise of that shape."""
    last = before_last(backbone, prompts, noise, steps, guidance)
    return picture(backbone, last, backbone.predict(*last), guidance)


def _split(
    backbone: Drafting, samples: Samples, answer: Tensor, guidance: float
) -> tuple[Tensor, Tensor]:
    """Return what the guided answer says: the picture, and the noise."""
    clean, _, noise, t = samples
    if passes_of(guidance) == 2:
        away, towards = answer.chunk(2)
        answer = away + guidance * (towards - away)
        clean, noise, t = (each.chunk(2)[0] for each in (clean, noise, t))
    return backbone.split(clean, noise, t, answer)
