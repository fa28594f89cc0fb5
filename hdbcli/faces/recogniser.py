"""A face recogniser: a frozen network that embeds aligned faces, and through which gradients pass.

dlib's is in `dlib`, SFace in `sface`: who is drawn is asked of both, since what one takes for a
likeness alone is a mark that fools it. B is the batch.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from hdbcli.faces.photo import similarity
from registry.errors import HdbError

ASSETS = Path(__file__).parent / "assets"
NUMBERS = 128  # of an embedding
BATCH = 32  # chips seen at once


class Recogniser(nn.Module):
    """What every recogniser says of its input: chips (B, 3, side, side) RGB from 0 to 255, in which
    a face's five points lie at `template` (5, 2), in pixels."""

    side: ClassVar[int]
    template: ClassVar[np.ndarray]
    # What of the way to the embedding is compared: early, in the middle and late.
    compared: ClassVar[tuple[int, int, int]]

    def features(self, pictures: Tensor) -> Iterator[Tensor]:
        """Yield what each block in turn makes (B, c, h, w) of pictures from 0 to 255."""
        raise NotImplementedError

    def embedding(self, last: Tensor) -> Tensor:
        """Return the embeddings (B, 128) that the last block's features say."""
        raise NotImplementedError

    def forward(self, chips: Tensor) -> Tensor:
        """Embed chips, as (B, 128)."""
        if chips.shape[1:] != (3, self.side, self.side):
            expected = f"(B, 3, {self.side}, {self.side})"
            raise ValueError(f"chips are {expected}, not {tuple(chips.shape)}")
        (last,) = deque(self.features(chips), maxlen=1)
        return self.embedding(last)

    def embed_aligned(self, images: Tensor, places: np.ndarray) -> Tensor:
        """Embed crops (B, 3, S, S) in -1..1 whose five points lie at `places` (5, 2) in 0..1, or
        (B, 5, 2) of each: (B, 128). Nothing is looked for, which takes time, and gradients pass."""
        chips = self.chips(images, places)
        return torch.cat([self(part) for part in chips.split(BATCH)]).to(images.device)

    def chips(self, images: Tensor, places: np.ndarray) -> Tensor:
        """Cut chips out of such crops, differentiably; on the CPU where a device cannot."""
        if images.device.type == "mps":  # which knows no bicubic sampling in some versions
            images = images.cpu()
        images, wide = images.float(), self.side  # a CPU resizes no bfloat16
        if images.shape[-1] > wide:  # the sampling below reads four pixels by four and no more
            images = F.interpolate(images, size=wide, mode="bilinear", antialias=True)
        side = images.shape[-1]
        matrices = []
        for points in np.reshape(places, (-1, 5, 2)):
            turn, shift = similarity(points * side, self.template)
            # torch counts from -1 to 1: the chip's point w shows the crop's slope * w + start.
            half = 1 + 1j
            slope, start = wide / side / turn, (wide * half - 2 * shift) / (turn * side) - half
            matrix = [[slope.real, -slope.imag, start.real], [slope.imag, slope.real, start.imag]]
            matrices.append(matrix)
        where = torch.tensor(matrices, device=images.device).expand(len(images), 2, 3)
        with torch.autocast(images.device.type, enabled=False):  # in bfloat16 points would move
            grid = F.affine_grid(where, [len(images), 3, wide, wide], align_corners=False)
        chips = F.grid_sample(
            images, grid, mode="bicubic", padding_mode="border", align_corners=False
        )
        return ((chips + 1) * 127.5).clamp(0, 255)


def read_network(path: Path) -> dict[str, Tensor]:
    """Read a network that ships; HdbError where it is missing or damaged."""
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise HdbError(f"{path.name} does not load ({error}); reinstall hyperdreambooth") from None
