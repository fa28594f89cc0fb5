"""The likeness loss: draw the person in a few steps, and ask a face recogniser how far they are
from the true picture.

Not in HyperDreamBooth. The diffusion loss never sees a picture drawn from noise, where small errors
of every step add up to somebody else; this one goes through the drawing itself, as PuLID does with
a distilled model (Guo et al. 2024, §3.3).
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from hdbcli.base import Base
from hdbcli.errors import HdbError
from hdbcli.lidb import Theta
from registry.spec import Drafting, SampleSettings

STEPS = 4
GUIDANCE = SampleSettings.guidance  # as `hdb gen` will draw


def likeness_loss(
    base: Base, theta: Theta, prompts: Sequence[str], noise: Tensor, true: Tensor
) -> Tensor:
    """Return the squared distance (B,) of drawn faces from the true ones.

    `noise` (B, c, h, w) is what they are drawn from and `true` (B, 128) the embeddings; B is a
    multiple of the people in theta, who lie fastest.
    """
    if not isinstance(base.backbone, Drafting):
        raise HdbError(
            f"base model {base.spec.name} cannot draw with gradients; train without --likeness"
        )
    base.injected.wear(theta)
    images = base.backbone.draft(prompts, noise, STEPS, GUIDANCE)
    return (base.embed(images) - true).square().sum(1)
