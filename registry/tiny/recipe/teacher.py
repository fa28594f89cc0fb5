"""TAEF2, the autoencoder whose latents ours learns to speak: 32 channels, 8 pixels to one.

Noise on its latents gives a slightly different face where the principal components of patches gave
haze: with half of each channel's deviation added, 100 % of 60 real people are still found first
among them, 38 % with components. By Ollin Boer Bohan ("TAESD", MIT licence); its files train the
autoencoder of `tiny` and are not shipped. Only the encoder is needed.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from registry.errors import HdbError

CHANNELS = 32
WIDTH = 64


class Block(nn.Module):
    """Three convolutions beside a skip, with a globally normalised branch where `pooled`."""

    def __init__(self, pooled: bool) -> None:
        super().__init__()
        self.conv = nn.Sequential(
            _conv(WIDTH, WIDTH), nn.ReLU(), _conv(WIDTH, WIDTH), nn.ReLU(), _conv(WIDTH, WIDTH)
        )
        self.pool = (
            nn.Sequential(
                nn.Conv2d(WIDTH, 4 * WIDTH, 1, bias=False),
                nn.GroupNorm(4, 4 * WIDTH),
                nn.ReLU(),
                nn.Conv2d(4 * WIDTH, WIDTH, 1, bias=False),
            )
            if pooled
            else None
        )

    def forward(self, x: Tensor) -> Tensor:
        if self.pool is not None:
            x = x + self.pool(x)
        return (self.conv(x) + x).relu()


def _conv(inside: int, outside: int, **settings: object) -> nn.Conv2d:
    return nn.Conv2d(inside, outside, 3, padding=1, **settings)  # type: ignore[arg-type]


def new_teacher() -> nn.Sequential:
    """Build the untrained encoder: pictures (B, 3, S, S) in 0..1, latents (B, 32, S / 8, S / 8)."""
    encoder = nn.Sequential(_conv(3, WIDTH), Block(False))
    for pooled in (False, False, True):
        encoder.append(_conv(WIDTH, WIDTH, stride=2, bias=False))
        encoder.extend(Block(pooled) for _ in range(3))
    return encoder.append(_conv(WIDTH, CHANNELS))


def load_teacher(folder: Path) -> nn.Sequential:
    """Load the encoder from `taef2_encoder.pth` in a folder. HdbError where it is missing."""
    file = folder / "taef2_encoder.pth"
    if not file.exists():
        raise HdbError(
            f"no {file}; get TAEF2's encoder from github.com/madebyollin/taesd and give its folder"
        )
    encoder = new_teacher()
    # Published as a pickle alone: `weights_only` reads tensors and runs nothing.
    encoder.load_state_dict(torch.load(file, map_location="cpu", weights_only=True))
    return encoder.requires_grad_(False).eval()
