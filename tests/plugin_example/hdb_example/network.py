"""The network: words to vectors, and a transformer over patches that both read (DiT, Peebles &
Xie 2022).

Shapes: B samples, c = 48 numbers of a 4 x 4 patch, h x w patches, W words, d the width.
"""

from __future__ import annotations

import math
import re
import zlib
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WIDTH, HEADS, DEPTH = 64, 4, 3
PATCH = 4  # pixels
NUMBERS = 3 * PATCH**2  # of a patch
WORDS, ROWS = 12, 512  # read of a prompt; of the embedding, row 0 for no word


def rows_of(text: str) -> list[int]:
    """Return the row of each word: a hash of it, so that there is no vocabulary to ship."""
    words = re.findall(r"[a-z0-9']+", text.lower())
    return [1 + zlib.crc32(word.encode()) % (ROWS - 1) for word in words]


class Words(nn.Module):
    """Prompts to (B, W, d): an embedding, and one layer over it."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(ROWS, WIDTH)
        self.mix = nn.Linear(WIDTH, WIDTH)

    def forward(self, prompts: Sequence[str]) -> Tensor:
        rows = [(rows_of(prompt) + [0] * WORDS)[:WORDS] for prompt in prompts]
        known = self.embedding(torch.tensor(rows, device=self.embedding.weight.device))
        return known + F.gelu(self.mix(known))


class Block(nn.Module):
    """Attention over words and patches together, then a layer as wide as usual, under one gate of
    the time."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.wide, self.narrow = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)
        self.gates = nn.Linear(WIDTH, 2 * WIDTH)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        attend, feed = self.gates(time)[:, None].chunk(2, -1)  # (B, 1, d) each
        y = F.layer_norm(x, (WIDTH,))
        q, k, v = (layer(y).unflatten(-1, (HEADS, -1)).transpose(1, 2) for layer in self._three())
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + (1 + attend) * self.out(y)
        y = F.layer_norm(x, (WIDTH,))
        return x + (1 + feed) * self.narrow(F.gelu(self.wide(y)))

    def _three(self) -> tuple[nn.Module, nn.Module, nn.Module]:
        return self.query, self.key, self.value


class Denoiser(nn.Module):
    """Noisy patches (B, c, h, w), times (B,) and words (B, W, d) to the velocity (B, c, h, w)."""

    def __init__(self) -> None:
        super().__init__()
        self.patch, self.time = nn.Linear(NUMBERS, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(DEPTH))
        self.last = nn.Linear(WIDTH, NUMBERS)

    def forward(self, x: Tensor, t: Tensor, words: Tensor) -> Tensor:
        height, width = x.shape[-2:]
        place = positions(height, width).to(x)
        time = self.time(waves(1000 * t, WIDTH).to(x))
        y = self.patch(x.flatten(2).mT) + place
        y = torch.cat([words.to(y), y], dim=1)
        for block in self.blocks:
            y = block(y, time)
        y = self.last(F.layer_norm(y[:, words.shape[1] :], (WIDTH,)))
        return y.mT.unflatten(2, (height, width))


def positions(height: int, width: int) -> Tensor:
    """Return a vector a patch (h x w, d), for pictures of any size."""
    rows, columns = (waves(torch.arange(n).float(), WIDTH // 2) for n in (height, width))
    pairs = rows[:, None].expand(-1, width, -1), columns[None].expand(height, -1, -1)
    return torch.cat(pairs, dim=-1).flatten(0, 1)


def waves(values: Tensor, width: int) -> Tensor:
    """Return sines and cosines (N, width) of values (N,)."""
    rates = torch.exp(-math.log(1000) * torch.arange(width // 2, device=values.device) / width * 2)
    angles = values[:, None].float() * rates
    return torch.cat([angles.sin(), angles.cos()], dim=-1)
