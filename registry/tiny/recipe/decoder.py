"""Train the decoder of `tiny` on pictures that the base model drew again out of noise.

Latents that were drawn are never exact, and the exact inverse of the encoder shows each of their
errors as a seam between patches. Its spare blocks see such latents beside the true pictures, and
learn to hide the seams. All else stays as it was written: the encoder, and with it what diffuses,
and the inverse itself, which a few hundred steps of training undo and thousands do not find again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderTiny, StableDiffusionPipeline
from torch import Tensor

from hdbcli.training.loop import Plan, Step, averages_of, fit, settle
from registry.errors import RegistryError
from registry.tiny import TEMPLATE
from registry.tiny.recipe.autoencoder import SCALE, encode, show
from registry.tiny.recipe.base import IDENTIFIER
from registry.tiny.recipe.pictures import STYLES, Pictures, half, read_pictures, to_unit
from registry.tiny.recipe.principal import spare_blocks
from registry.tiny.recipe.styles import CAPTIONS

PICTURES = 12_000  # drawn again
DEEPEST = 0.3  # at most so much of the way to noise: beyond it another person comes back
STROKES = 4  # steps back from there
JUDGED = 4  # one in so many the face embedding judges: it costs more than the decoder
WEIGHT = 0.3  # of its squared distance

# Of aligned pictures (B, 3, S, S) in -1..1 whose five points lie where a template says.
Embedding = Callable[[Tensor, np.ndarray], Tensor]


def train_decoder(
    build: Path, plan: Plan, batch: int, device: str, embedding: Embedding | None
) -> Iterator[Step]:
    """Train from the exact inverse on; resumable. Write the autoencoder and a sheet."""
    folder = build / "pipeline"
    if not folder.exists():
        raise RegistryError(f"no pipeline in {folder}; run the base step first")
    pipeline = StableDiffusionPipeline.from_pretrained(folder).to(device)
    # The one whose latents the base model knows.
    model = AutoencoderTiny.from_pretrained(folder / "vae").to(memory_format=torch.channels_last)
    model.to(device)
    pictures = read_pictures(build / "people").some(PICTURES, plan.seed)
    drawn = _draw_again(pipeline, model, pictures, plan.seed)

    def loss(generator: torch.Generator) -> Tensor:
        pick = torch.randint(len(drawn), (batch,), generator=generator)
        images = to_unit(pictures.pixels[pick].to(device))
        return _loss(model, drawn[pick.to(device)].float(), images, embedding)

    parameters = {
        f"{k}.{name}": parameter
        for k, block in enumerate(spare_blocks(model))
        for name, parameter in block.named_parameters()
    }
    averages = averages_of(parameters)
    optimizer = torch.optim.AdamW(
        parameters.values(), lr=plan.lr, weight_decay=0, betas=(0.9, 0.99)
    )
    yield from fit(parameters, loss, optimizer, plan, averages, build / "decoder.safetensors")
    settle(parameters, averages)
    show(model.eval(), build)
    model.to("cpu").save_pretrained(build / "vae")


@torch.no_grad()
def _draw_again(
    pipeline: StableDiffusionPipeline, vae: AutoencoderTiny, pictures: Pictures, seed: int
) -> Tensor:
    """Take each picture part of the way to noise, and back in a few steps: (N, c, h, w) float16."""
    signal = pipeline.scheduler.alphas_cumprod.to(pipeline.device)
    prompts = [CAPTIONS[style].replace("[V]", IDENTIFIER) for style in STYLES]
    ids = pipeline.tokenizer(prompts, padding="max_length", return_tensors="pt").input_ids
    states = pipeline.text_encoder(ids.to(pipeline.device)).last_hidden_state
    generator = torch.Generator().manual_seed(seed)
    drawn = []
    for pixels, styles in zip(pictures.pixels.split(200), pictures.styles.split(200), strict=True):
        latent = encode(vae, pixels.to(vae.device))
        start = torch.rand(len(latent), generator=generator) * DEEPEST * (len(signal) - 1)
        start = start.to(latent)
        noise = torch.randn(latent.shape, generator=generator).to(latent)
        for stroke in range(STROKES):
            t = (start * (1 - stroke / STROKES)).long()
            a, s = (x.sqrt().view(-1, 1, 1, 1) for x in (signal[t], 1 - signal[t]))
            noised = a * latent + s * noise
            with half(noised.device):
                velocity = pipeline.unet(noised, t, states[styles]).sample.float()
            latent, noise = a * noised - s * velocity, s * noised + a * velocity
        drawn.append(latent.half())
    return torch.cat(drawn)


def _loss(
    model: AutoencoderTiny, latent: Tensor, image: Tensor, embedding: Embedding | None
) -> Tensor:
    with half(latent.device):
        decoded = model.decode(latent / SCALE).sample.float()
    loss = F.l1_loss(decoded, image)
    for axis in (2, 3):  # differences between neighbours: edges stay sharp
        loss = loss + F.l1_loss(decoded.diff(dim=axis), image.diff(dim=axis))
    if embedding is not None:
        # The same face must stay the same face: L1 alone blurs eyes and mouths away.
        faces = max(1, len(image) // JUDGED)
        with half(latent.device):
            mine = embedding(decoded[:faces], np.array(TEMPLATE))
            with torch.no_grad():
                true = embedding(image[:faces], np.array(TEMPLATE))
        loss = loss + WEIGHT * (mine.float() - true.float()).square().sum(1).mean()
    return loss
