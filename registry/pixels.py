"""Pictures as files hold them, 0 to 255, and as networks do, -1 to 1."""

from __future__ import annotations

import torch
from torch import Tensor


def to_unit(pixels: Tensor) -> Tensor:
    """Map uint8 of any shape to float32 from -1 to 1."""
    return pixels.float() / 127.5 - 1


def to_pixels(images: Tensor) -> Tensor:
    """Map numbers of any shape to uint8, what lies outside -1 to 1 to the nearest there is."""
    return ((images.detach().float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
