"""Prior preservation: while a face is refined, prompts that do not ask for it, or ask for a style
too, are answered as before.

    loss = weight * || v(x_t, c; theta) - v(x_t, c; before) ||^2,  c in turn:
      a prompt without [V], such as "a face": before is the base model alone
      a caption with [V], "a Pixar character of a [V] face": before is the prediction

Without the first all people become the person. Without the second refinement, which looks at plain
portraits alone, forgets what else a prompt says: a selfie becomes the photo once more. It is the
likeness loss that takes styles, so they are held the harder the more it weighs. x_t is noise on a
picture that `before` drew of the prompt, mostly much of it. DreamBooth (Ruiz et al. 2022,
§3.3) preserves such pictures; here the answers themselves are compared, which says the same without
the noise of the diffusion loss. Not in HyperDreamBooth.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from hdbcli.config import CAPTIONS, PORTRAIT, unnamed
from hdbcli.method.lidb import Factors
from hdbcli.model.base import Base
from hdbcli.model.device import autocast
from hdbcli.training.likeness_loss import draft
from hdbcli.training.questions import (
    Question,
    Samples,
    answers,
    distance,
    joined,
    pairs_at_once,
)
from registry.seeds import generator_of, noise_of
from registry.spec import NOISIEST, Drafting, shifted

WEIGHT = 2.0
STYLES = 10.0  # what a caption with [V] weighs more, times what likeness weighs
STEPS = 2  # of drawing what is noised again, mostly by much
SHIFT = 4.0  # of times towards the noise: there a style is decided, and its light is lost


def preservation(
    base: Base, start: Factors, photos: Tensor, predicted: bool, likeness: float
) -> Callable[[int], Question]:
    """Return what asks for the loss of a step for P people, summed over them, one prompt a step.

    `start` is what they start from. If it is `predicted`, captions with [V] are held to it: those
    of the base alone would keep the person out of them. `photos` (P, c, h, w) are latents of
    theirs, which are noised where the base cannot draw with gradients; `likeness` is what the
    likeness loss beside this one weighs. The function is handed the step's number.
    """
    sides = (tuple(each.detach().clone() for each in side) for side in (start.down, start.up))
    before = Factors(*sides)  # which training changes in place
    people = len(photos)
    turns = turns_of(predicted)

    # What answers are held to is known before training starts. So prompts that are held to the same
    # are drawn, and answered for a round of turns, in one go, when first asked for.
    @functools.cache
    def drawn(adapted: bool) -> dict[int, Tensor]:
        mine = [turn for turn, (_, held) in enumerate(turns) if held == adapted]
        prompts = [turns[turn][0] for turn in mine]
        pictures = _drawn(base, before if adapted else None, prompts, photos, mine)
        return dict(zip(mine, pictures, strict=True))

    @functools.lru_cache(maxsize=2)  # this round's
    def held(adapted: bool, first: int) -> dict[int, tuple[Samples, Tensor]]:
        asked = {}
        for turn, clean in drawn(adapted).items():
            generator = torch.Generator().manual_seed(first + turn)
            noise = torch.randn((1, *clean.shape[1:]), generator=generator)
            t = shifted(torch.rand(1, generator=generator), SHIFT).clamp(max=NOISIEST)
            prompts = [base.prompt(turns[turn][0])] * people
            noise = noise.expand_as(clean).to(clean)
            asked[turn] = Samples(clean, prompts, noise, t.expand(people).to(clean))
        adapter = before if adapted else None
        wanted = answers(base, adapter, joined(list(asked.values())), people).split(people)
        return {turn: (asked[turn], own) for turn, own in zip(asked, wanted, strict=True)}

    def question(number: int) -> Question:
        turn = number % len(turns)
        asked = turns[turn][1]
        samples, wanted = held(asked, number - turn)[turn]
        return distance(samples, wanted).weighed(WEIGHT + asked * STYLES * likeness)

    return question


def turns_of(predicted: bool) -> list[tuple[str, bool]]:
    """Return (prompt, whether it is held to the prediction) of one step after the other: every
    third one is of the class, in each style too."""
    unasked = [(unnamed(prompt), False) for prompt in (PORTRAIT, *CAPTIONS)]
    if not predicted:
        return unasked
    asked = [(caption, True) for caption in CAPTIONS]
    rounds = zip(unasked, asked, asked[2:] + asked[:2], strict=False)
    return [*(pair for three in rounds for pair in three), unasked[-1]]


@torch.no_grad()
def _drawn(
    base: Base,
    adapter: Factors | None,
    prompts: Sequence[str],
    photos: Tensor,
    seeds: Sequence[int],
) -> list[Tensor]:
    """Draw latents (P, c, h, w) of each prompt in a few steps, all people's from the same noise."""
    if not isinstance(base.backbone, Drafting):
        return [photos] * len(prompts)
    people = 1 if adapter is None else len(photos)
    pictures: list[Tensor] = []
    size = pairs_at_once(base, people, photos)
    with base.adapted(adapter):
        for first in range(0, len(prompts), size):
            some = slice(first, first + size)
            noise = noise_of(map(generator_of, seeds[some]), photos.shape[1:])
            noise = noise.repeat_interleave(people, 0).to(base.device)
            asked = [base.prompt(prompt) for prompt in prompts[some] for _ in range(people)]
            with autocast(base.device, latents=noise):
                clean = draft(base.backbone, asked, noise, STEPS, base.spec.guidance)
            pictures += clean.float().split(people)
    return [each.expand_as(photos) for each in pictures]
