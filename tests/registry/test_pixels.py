"""What files hold and what networks do are the same pictures."""

from __future__ import annotations

import torch

from registry.pixels import to_pixels, to_unit


def test_every_level_survives_the_way_to_a_network_and_back() -> None:
    levels = torch.arange(256, dtype=torch.uint8).view(2, 128)
    images = to_unit(levels)
    assert (images.min(), images.max(), images.dtype) == (-1, 1, torch.float32)
    assert torch.equal(to_pixels(images), levels)
    # Not by chance: half a level on, most are others; and what lies outside ends at the edge.
    assert not torch.equal(to_pixels(images + 1.01 / 255), levels)
    assert to_pixels(torch.tensor([-1.5, 1.5], dtype=torch.bfloat16)).tolist() == [0, 255]
