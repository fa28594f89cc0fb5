"""Train the in-domain CLIP of `tiny` on the captioned renders."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from hdbcli.training.loop import Plan, Step, averages_of, fit
from registry.checkpoints.safetensors import save_tensors
from registry.tiny.clip import SIZE, InDomainClip
from registry.tiny.recipe.pictures import as_images, read_pictures
from registry.tiny.recipe.styles import CAPTIONS

TEXTS = [caption.replace("[V] ", "") for caption in CAPTIONS.values()]


def train_clip(build: Path, plan: Plan, batch: int, device: str) -> Iterator[Step]:
    """Train by cross-entropy over the captions: CLIP's loss where a batch repeats its captions."""
    pictures = read_pictures(build / "people")
    torch.manual_seed(plan.seed)
    model = InDomainClip(sorted({word for text in TEXTS for word in text.lower().split()}))
    model.to(device)

    def losses(generator: torch.Generator) -> Iterator[Tensor]:
        pick = torch.randint(len(pictures.pixels), (batch,), generator=generator)
        images = _worsened(as_images(pictures.pixels[pick]), generator).to(device)
        yield F.cross_entropy(model(images, TEXTS), pictures.styles[pick].to(device))

    parameters = dict(model.named_parameters())
    averages = averages_of(parameters)
    optimizer = torch.optim.AdamW(parameters.values(), lr=plan.lr, weight_decay=0.05)
    yield from fit(
        parameters, losses, optimizer, plan, averages, build / "clip-checkpoint.safetensors"
    )
    half = {name: value.half().cpu() for name, value in averages.items()}
    metadata = {"format": "pt", "words": json.dumps(model.words)}
    save_tensors(half, build / "clip.safetensors", metadata)


def _worsened(images: Tensor, generator: torch.Generator) -> Tensor:
    """Mirror, blur and roughen at random: what is judged later is drawn, not rendered."""
    if torch.rand((), generator=generator) < 0.5:
        images = images.flip(-1)
    size = int(torch.randint(SIZE * 3 // 8, SIZE + 1, (), generator=generator))
    small = F.interpolate(images, (size, size), mode="area")
    images = F.interpolate(small, (SIZE, SIZE), mode="bilinear")
    grain = 0.1 * torch.rand((), generator=generator)
    return images + grain * torch.randn(images.shape, generator=generator)
