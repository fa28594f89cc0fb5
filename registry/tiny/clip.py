"""In-domain CLIP: a small encoder of pictures and captions, trained on the captioned renders
of `tiny`.

It measures what CLIP measures for Stable Diffusion, whether a picture shows what its caption says,
and is no CLIP: it knows the styles of `tiny` and nothing else (Radford et al. 2021 for the method).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from registry.checkpoints.safetensors import read_tensors
from registry.errors import HdbError
from registry.pixels import to_unit

WEIGHTS = Path(__file__).parent / "weights/clip.safetensors"
SIZE = 64  # px
CHANNELS = (24, 48, 96, 128)
WIDTH = 64  # of the shared space


class InDomainClip(nn.Module):
    """Embed pictures and captions so that a picture lies next to its caption."""

    def __init__(self, words: Sequence[str]) -> None:
        super().__init__()
        self.words = tuple(words)
        layers: list[nn.Module] = []
        inputs = 3
        for width in CHANNELS:
            layers += [nn.Conv2d(inputs, width, 3, 2, 1), nn.GELU()]
            inputs = width
        self.picture = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.picture_out = nn.Linear(inputs, WIDTH)
        self.word = nn.Embedding(len(self.words), WIDTH)
        self.text_out = nn.Linear(WIDTH, WIDTH)
        self.scale = nn.Parameter(torch.tensor(2.3))  # log of the temperature's inverse

    def embed_pictures(self, pictures: Tensor) -> Tensor:
        """Embed pictures (B, 3, 64, 64) in -1..1 as unit vectors (B, WIDTH)."""
        return F.normalize(self.picture_out(self.picture(pictures)), dim=1)

    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        """Embed captions as unit vectors (T, WIDTH); words that no caption has say nothing."""
        index = {word: i for i, word in enumerate(self.words)}
        rows, device = [], self.word.weight.device
        none = torch.zeros(1, WIDTH, device=device)
        for text in texts:
            known = [index[word] for word in text.lower().split() if word in index]
            words = self.word(torch.tensor(known, device=device)) if known else none
            rows.append(words.mean(0))
        return F.normalize(self.text_out(torch.stack(rows)), dim=1)

    def forward(self, pictures: Tensor, texts: Sequence[str]) -> Tensor:
        """Return how well each picture fits each caption (B, T), as logits."""
        return self.scale.exp() * self.embed_pictures(pictures) @ self.embed_texts(texts).T

    @torch.no_grad()
    def score(self, pictures: Sequence[np.ndarray], references: Sequence[Any]) -> list[list[float]]:
        """Score as `registry.metric.Metric` does: the cosine of every picture and every caption."""
        fitted = []
        for picture in pictures:
            image = to_unit(torch.from_numpy(picture).permute(2, 0, 1)[None])
            fitted.append(F.interpolate(image, (SIZE, SIZE), mode="area"))
        return (self.embed_pictures(torch.cat(fitted)) @ self.embed_texts(references).T).tolist()


def load_clip(path: Path = WEIGHTS) -> InDomainClip:
    """Load the encoder that ships; HdbError if it is missing or damaged."""
    try:
        metadata, tensors = read_tensors(path)
        model = InDomainClip(json.loads(metadata["words"]))
        model.load_state_dict(tensors)
    except (HdbError, KeyError, ValueError, TypeError, RuntimeError) as error:
        raise HdbError(f"{path} does not load ({error}); reinstall hyperdreambooth") from error
    return model.eval()
