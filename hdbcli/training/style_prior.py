"""Prior preservation of styles: while a face is refined for likeness, prompts that ask for a style
are answered as they were before.

Refinement looks at plain portraits alone, and without this forgets what else the prompt says: a
selfie becomes the photo once more. DreamBooth (Ruiz et al. 2022, §3.3) preserves pictures that the
base drew of the class; here they are pictures of the person, as predicted, and the answers
themselves are compared, not noise. Not in HyperDreamBooth.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from hdbcli.config import CAPTIONS
from hdbcli.method.lidb import Factors
from hdbcli.model.base import Base
from hdbcli.model.device import autocast
from hdbcli.training.likeness_loss import STEPS, check_drafts

WEIGHT = 2.0
EARLIEST = 0.2  # at less noise there is no style left to decide
SEED = 0


def style_prior(
    base: Base, worn: Factors, people: int, shape: torch.Size
) -> Callable[[Factors, torch.Generator, int], Tensor]:
    """Return what adds to the loss of a step for P people with latents of a shape (c, h, w), person
    p wearing row p: WEIGHT times the squared distance of their answers from those they give in what
    they wear now, to one caption after the other.

    It is handed what they wear by then, and the step's generator and number.
    """
    sides = (tuple(each.detach().clone() for each in side) for side in (worn.down, worn.up))
    before = Factors(*sides)  # which training changes in place

    @functools.cache  # drawn when first asked for: a method that only predicts asks for none
    def drawn(caption: str) -> Tensor:
        with torch.no_grad():
            return _draft(base, before, caption, people, shape)

    def loss(worn: Factors, generator: torch.Generator, turn: int) -> Tensor:
        caption = CAPTIONS[turn % len(CAPTIONS)]
        clean, prompts = drawn(caption), [base.prompt(caption)] * people
        noise = torch.randn((1, *shape), generator=generator).expand_as(clean).to(clean)
        t = EARLIEST + (1 - EARLIEST) * torch.rand(1, generator=generator)
        asked = clean, prompts, noise, t.expand(people).to(clean)
        with autocast(base.device, latents=clean):
            with torch.no_grad(), base.wearing(before):
                wanted = base.backbone.predict(*asked)
            with base.wearing(worn), base.short_attention(clean):
                far = (base.backbone.predict(*asked) - wanted).square().mean((1, 2, 3))
        return WEIGHT * far.sum()

    return loss


def _draft(base: Base, worn: Factors, caption: str, people: int, shape: torch.Size) -> Tensor:
    """Draw everybody's latents (P, c, h, w) in few steps, from the same noise."""
    noise = torch.randn((1, *shape), generator=torch.Generator().manual_seed(SEED))
    start = noise.expand(people, *shape).to(base.device)
    prompts = [base.prompt(caption)] * people
    with base.wearing(worn), autocast(base.device, latents=start):
        return check_drafts(base).draft(prompts, start, STEPS, base.spec.guidance).float()
