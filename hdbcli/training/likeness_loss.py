"""The likeness loss: draw the person in a few steps, and ask a face recogniser how far they are
from the true picture.

The recogniser hardly sees colours: alone it gave all people one complexion and blue eyes. So the
middle of the picture, coarse as a mosaic, is compared too. And faces in a haze please it: with half
the contrast of true ones, eyes and glasses gone. So contrast is compared in the same cells.

Where every step of drawing starts from fresh noise, the first ones decide who is drawn, and the
last only sharpen: asked of those, faces came out carved from wood. So there the loss looks at what
the network makes of the picture earlier on, which is blurred, and leaves contrast alone.

Not in HyperDreamBooth. The diffusion loss never sees a picture drawn from noise, where small errors
of every step add up to another person; this one goes through the drawing itself, as PuLID does with
a distilled model (Guo et al. 2024, §3.3).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from hdbcli.config import PORTRAIT
from hdbcli.method.hypernet import Faces
from hdbcli.method.lidb import Factors, Theta
from hdbcli.model.base import Base
from hdbcli.model.device import autocast
from hdbcli.training.drafting import before_last, picture
from hdbcli.training.questions import Question, Samples, pairs_at_once
from registry.errors import HdbError
from registry.spec import Drafting

STEPS = 4
RENEWED, EARLY = 6, 5  # steps where noise is renewed, and after how many of them it looks
AHEAD = 4  # steps of refinement whose drafts are begun together, in half the time
SHARE = 4  # one sample in SHARE of a step is drawn from noise too, which costs several passes
CONTRAST = 0.2  # its weight, so that it counts about as much as colours do


def likeness(
    base: Base,
    prompts: Sequence[str],
    noise: Tensor,
    true: Tensor,
    traits: Tensor,
    precision: str = "auto",
) -> Question:
    """Draw faces up to the last step, and ask for the squared distances (B,) from the true ones, of
    embeddings, colours and contrast.

    `noise` (B, c, h, w) is what they are drawn from, `true` (B, 3, S, S) the aligned pictures in
    -1..1 and `traits` (B, 128) the embeddings of their faces; B is a multiple of the people whom
    the base is adapted to, who lie fastest.
    """
    return _compared(base, _begun(base, prompts, noise, precision), true, traits, precision)


def _begun(base: Base, prompts: Sequence[str], noise: Tensor, precision: str = "auto") -> Samples:
    """Draw up to the step that is looked at, and return what that asks."""
    backbone, guidance = check_drafts(base), base.spec.guidance
    steps, taken = (RENEWED, EARLY) if backbone.renews else (STEPS, STEPS)
    with autocast(base.device, precision, noise):
        return before_last(backbone, prompts, noise, steps, guidance, taken)


def _compared(
    base: Base, last: Samples, true: Tensor, traits: Tensor, precision: str = "auto"
) -> Question:
    """Ask how far the pictures are that the last step leads to, finished ones in contrast too."""
    backbone, guidance = check_drafts(base), base.spec.guidance

    def far(answer: Tensor) -> Tensor:
        drawn = picture(backbone, last, answer, guidance)
        with autocast(base.device, precision):
            images = backbone.decode(drawn)
            far = apart(images, base.embed(images), true, traits)
            if backbone.renews:
                return far
            return far + CONTRAST * (contrast(images) - contrast(true)).square().mean((1, 2, 3))

    return Question(last, far)


def portrait_likeness(
    base: Base, faces: Sequence[Faces], weight: float
) -> Callable[[Theta | Factors | None, torch.Generator, int, int], Question]:
    """Return what asks for the loss of a step for P people, person p by row p of the adapter: the
    weighted distance of their portraits from the faces on their photos, in turn.

    It takes their adapter, and the step's generator, batch and number; all people's portraits
    start from the same noise. Portraits of AHEAD steps are begun together, as the people are then.
    """
    check_drafts(base)
    shape, prompt = faces[0].latents.shape[1:], base.prompt(PORTRAIT)
    begun: list[Samples] = []  # of this step and the next ones

    def question(
        adapter: Theta | Factors | None, generator: torch.Generator, batch: int, turn: int
    ) -> Question:
        count = portraits_of(batch)
        if not begun:
            fits = pairs_at_once(base, len(faces), faces[0].latents)
            ahead = AHEAD if fits >= AHEAD * count else 1
            noise = torch.randn((ahead * count, *shape), generator=generator)
            noise = noise.repeat_interleave(len(faces), 0).to(base.device)
            with base.adapted(adapter):
                drafts = _begun(base, [prompt] * len(noise), noise)
            rows = torch.arange(len(drafts.clean)).view(-1, ahead, count * len(faces))
            begun.extend(drafts.part(rows[:, k].flatten().tolist()) for k in range(ahead))
        own = [(each, (turn + k) % len(each.crops)) for k in range(count) for each in faces]
        true = torch.stack([each.crops[k] for each, k in own])
        traits = torch.stack([each.traits[k] for each, k in own])
        far = _compared(base, begun.pop(0), true, traits)
        return far.weighed(weight / count)

    return question


def portraits_of(batch: int) -> int:
    """Return how many portraits of a person are drawn in a step of so many samples."""
    return max(1, batch // SHARE)


def check_drafts(base: Base) -> Drafting:
    """Return the backbone that draws with gradients; HdbError if this base's does not."""
    if not isinstance(base.backbone, Drafting):
        raise HdbError(
            f"base model {base.spec.name} cannot draw with gradients; leave --likeness out"
        )
    return base.backbone


def apart(images: Tensor, seen: Tensor, true: Tensor, traits: Tensor) -> Tensor:
    """Return how far the people on pictures (B, 3, S, S), with embeddings `seen` (B, 128), are from
    those on the true ones, with `traits`: squared distances (B,) of embeddings and of colours."""
    far = (seen - traits).square().sum(1)
    return far + (mosaic(images) - mosaic(true)).square().mean((2, 3)).sum(1)


def mosaic(images: Tensor) -> Tensor:
    """Return the means of the middle half of pictures (B, c, S, S) in 8 x 8 cells: of colours, or
    of whatever a pixel has."""
    return F.adaptive_avg_pool2d(images.float(), 16)[:, :, 4:12, 4:12]


def contrast(images: Tensor) -> Tensor:
    """Return how strong fine detail is in the same cells (B, 1, 8, 8): the logarithm, so that dark
    faces count as bright ones do, of the root mean square of what a blur over S / 32 pixels takes
    off the brightness of pictures (B, 3, S, S)."""
    bright = images.float().mean(1, keepdim=True)
    reach = images.shape[-1] // 64
    blurred = F.avg_pool2d(F.pad(bright, (reach,) * 4, mode="replicate"), 2 * reach + 1, 1)
    return 0.5 * (mosaic((bright - blurred).square()) + 1e-4).log()  # -4.6 where there is none
