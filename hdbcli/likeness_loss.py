"""The likeness loss: draw the person in a few steps, and ask a face recogniser how far they are
from the true picture.

The recogniser hardly sees colours: alone it gave everybody one complexion and blue eyes. So the
middle of the picture, coarse as a mosaic, is compared too.

Not in HyperDreamBooth. The diffusion loss never sees a picture drawn from noise, where small errors
of every step add up to somebody else; this one goes through the drawing itself, as PuLID does with
a distilled model (Guo et al. 2024, §3.3).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from hdbcli.base import Base
from hdbcli.errors import HdbError
from hdbcli.lidb import Theta
from registry.spec import Drafting, SampleSettings

STEPS = 4
GUIDANCE = SampleSettings.guidance  # as `hdb gen` will draw


def likeness_loss(
    base: Base, theta: Theta, prompts: Sequence[str], noise: Tensor, true: Tensor, traits: Tensor
) -> Tensor:
    """Return the squared distances (B,) of drawn faces from the true ones, of embeddings and of
    colours.

    `noise` (B, c, h, w) is what they are drawn from, `true` (B, 3, S, S) the aligned pictures in
    -1..1 and `traits` (B, 128) the embeddings of their faces; B is a multiple of the people in
    theta, who lie fastest.
    """
    base.injected.wear(theta)
    images = check_drafts(base).draft(prompts, noise, STEPS, GUIDANCE)
    far = (base.embed(images) - traits).square().sum(1)
    return far + (mosaic(images) - mosaic(true)).square().mean((2, 3)).sum(1)


def check_drafts(base: Base) -> Drafting:
    """Return the backbone that draws with gradients; HdbError if this base's does not."""
    if not isinstance(base.backbone, Drafting):
        raise HdbError(
            f"base model {base.spec.name} cannot draw with gradients; train without --likeness"
        )
    return base.backbone


def mosaic(images: Tensor) -> Tensor:
    """Return the colours of the middle half of pictures (B, 3, S, S), in 8 x 8 cells."""
    return F.adaptive_avg_pool2d(images.float(), 16)[:, :, 4:12, 4:12]
