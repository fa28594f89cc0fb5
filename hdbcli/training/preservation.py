"""Prior preservation: while a face is refined, prompts that do not ask for it, or ask for a style
too, are answered as before.

    loss = WEIGHT * || v(x_t, c; theta) - v(x_t, c; before) ||^2,  c in turn:
      a prompt without [V], such as "a face": before is the base model alone
      a caption with [V], "a Pixar character of a [V] face": before is the prediction

Without the first all people become the person. Without the second refinement, which looks at plain
portraits alone, forgets what else a prompt says: a selfie becomes the photo once more. x_t is noise
on a picture that `before` drew of the prompt. DreamBooth (Ruiz et al. 2022, §3.3) preserves such
pictures; here the answers themselves are compared, which says the same without the noise of the
diffusion loss. Not in HyperDreamBooth.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from hdbcli.config import CAPTIONS, PORTRAIT, unnamed
from hdbcli.method.lidb import Factors
from hdbcli.model.base import Base
from hdbcli.model.device import autocast
from hdbcli.training.likeness_loss import STEPS
from registry.spec import Drafting

WEIGHT = 2.0
EARLIEST = 0.2  # at less noise there is no style left to decide


def preservation(
    base: Base, start: Factors, photos: Tensor, predicted: bool
) -> Callable[[Factors, torch.Generator, int], Iterator[Tensor]]:
    """Return what yields the loss of a step for P people, summed over them, one prompt a step.

    `start` is what they start from. If it is `predicted`, captions with [V] are held to it: those
    of the base alone would keep the person out of them. `photos` (P, c, h, w) are latents of
    theirs, which are noised where the base cannot draw with gradients. The function is handed the
    factors by then, and the step's generator and number.
    """
    sides = (tuple(each.detach().clone() for each in side) for side in (start.down, start.up))
    before = Factors(*sides)  # which training changes in place
    people = len(photos)
    turns = _turns(predicted)

    @functools.cache  # drawn when first asked for: a method that only predicts asks for none
    def drawn(turn: int) -> Tensor:
        prompt, adapted = turns[turn]
        return _drawn(base, before if adapted else None, prompt, photos, seed=turn)

    def losses(now: Factors, generator: torch.Generator, turn: int) -> Iterator[Tensor]:
        prompt, adapted = turns[turn % len(turns)]
        clean = drawn(turn % len(turns))
        noise = torch.randn((1, *clean.shape[1:]), generator=generator).expand_as(clean).to(clean)
        t = EARLIEST + (1 - EARLIEST) * torch.rand(1, generator=generator)
        asked = clean, [base.prompt(prompt)] * people, noise, t.expand(people).to(clean)
        precision = autocast(base.device, latents=clean)
        with base.adapted(before if adapted else None), torch.no_grad(), precision:
            wanted = base.backbone.predict(*asked)
        with base.adapted(now), base.short_attention(clean):
            with autocast(base.device, latents=clean):
                far = (base.backbone.predict(*asked) - wanted).square().mean((1, 2, 3))
            yield WEIGHT * far.sum()

    return losses


def _turns(predicted: bool) -> list[tuple[str, bool]]:
    """Return (prompt, whether it is held to the prediction) of one step after the other: every
    second one is of the class, in each style too."""
    unasked = [(unnamed(prompt), False) for prompt in (PORTRAIT, *CAPTIONS)]
    if not predicted:
        return unasked
    asked = [(caption, True) for caption in CAPTIONS]
    return [pair for both in zip(unasked, [*asked, unasked[0]], strict=True) for pair in both]


@torch.no_grad()
def _drawn(base: Base, adapter: Factors | None, prompt: str, photos: Tensor, seed: int) -> Tensor:
    """Draw latents (P, c, h, w) in a few steps, all from the same noise."""
    if not isinstance(base.backbone, Drafting):
        return photos
    count = 1 if adapter is None else len(photos)
    noise = torch.randn((1, *photos.shape[1:]), generator=torch.Generator().manual_seed(seed))
    noise = noise.expand(count, -1, -1, -1).to(base.device)
    prompts = [base.prompt(prompt)] * count
    with base.adapted(adapter), autocast(base.device, latents=noise):
        clean = base.backbone.draft(prompts, noise, STEPS, base.spec.guidance)
    return clean.float().expand_as(photos)
