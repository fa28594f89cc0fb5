"""How Stable Diffusion XL reads prompts: two text encoders, a pooled state, and sizes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from registry.stable_diffusion.backbone import Conditions, tokens

if TYPE_CHECKING:
    from registry.stable_diffusion.backbone import Pipeline


def two_encoders(pipeline: Pipeline, prompts: Sequence[str], pixels: tuple[int, int]) -> Conditions:
    """Return the states of both encoders before their last layer, side by side, and what is added
    to the time: the second one's pooled state and sizes.

    The sizes say that the picture was never scaled nor cropped, as the pipeline does by default.
    """
    first = pipeline.text_encoder(tokens(pipeline, "", prompts), output_hidden_states=True)
    second = pipeline.text_encoder_2(tokens(pipeline, "_2", prompts), output_hidden_states=True)
    states = torch.cat([first.hidden_states[-2], second.hidden_states[-2]], dim=-1)
    sizes = torch.tensor([[*pixels, 0, 0, *pixels]], dtype=states.dtype, device=states.device)
    return Conditions(
        states, {"text_embeds": second.text_embeds, "time_ids": sizes.expand(len(states), -1)}
    )
