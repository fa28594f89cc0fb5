"""The autoencoder of `tiny`: principal components of patches, and a decoder trained from their
exact inverse.

On aligned faces the components keep who somebody is better than a jointly trained encoder did in
an hour (README of the recipe), and they never change: base model and hypernetwork can be trained
while the decoder still learns to hide the seams between patches.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderTiny
from torch import Tensor

from registry.tiny.recipe.pictures import Pictures, read_pictures, sheet, to_pixels, to_unit
from registry.tiny.recipe.principal import WIDTH, components, write_decoder, write_encoder
from registry.training import Plan, Step, fit

CHANNELS = 24  # principal components kept of each patch's 192 numbers
TEMPER = 0.5  # deviations of the components are raised to this power
SCALE = 8.0  # latents that diffuse / latents that the decoder reads: tanh bends those beyond 1
BATCH = 8
WRONG = 0.2  # largest deviation of the noise that training adds to latents
FACES = 1  # of a batch the face embedding judges: it costs more than the decoder

Embedding = Callable[[Tensor], Tensor]


def new_autoencoder(pictures: Tensor) -> AutoencoderTiny:
    """Build the network that is right from the start for uint8 pictures (N, 3, S, S)."""
    model = AutoencoderTiny(
        encoder_block_out_channels=(48,) * 4,
        decoder_block_out_channels=(WIDTH,) * 4,
        num_encoder_blocks=(0, 0, 0, 0),
        num_decoder_blocks=(5, 2, 2, 2),
        latent_channels=CHANNELS,
        upsampling_scaling_factor=2,
        scaling_factor=SCALE,
    )
    parts = components(pictures / 255, CHANNELS, TEMPER, SCALE)
    write_encoder(model, parts)
    write_decoder(model, parts)
    return model.to(memory_format=torch.channels_last)


def train_autoencoder(build: Path, plan: Plan, embedding: Embedding | None) -> Iterator[Step]:
    """Write the components, then train the decoder; resumable, and usable after 0 steps."""
    pictures = read_pictures(build / "people")
    torch.manual_seed(plan.seed)
    model = new_autoencoder(pictures.pixels[:: max(1, len(pictures.pixels) // 8192)])
    model.save_pretrained(build / "vae")

    def loss(generator: torch.Generator) -> Tensor:
        return _loss(model, pictures, embedding, generator)

    parameters = dict(model.decoder.named_parameters())
    averages = {name: p.detach().clone() for name, p in parameters.items()}
    optimizer = torch.optim.AdamW(
        parameters.values(), lr=plan.lr, weight_decay=0, betas=(0.9, 0.99)
    )
    yield from fit(parameters, loss, optimizer, plan, averages, build / "decoder.safetensors")
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(averages[name])
    model.eval().save_pretrained(build / "vae")
    _show(model, build)


def _loss(
    model: AutoencoderTiny,
    pictures: Pictures,
    embedding: Embedding | None,
    generator: torch.Generator,
) -> Tensor:
    pick = torch.randint(len(pictures.pixels), (BATCH,), generator=generator)
    image = to_unit(pictures.pixels[pick])
    latent = encode(model, pictures.pixels[pick])
    # Latents that were sampled are never exact: train on wrong ones, up to a fifth of their size.
    wrong = WRONG * torch.rand((BATCH, 1, 1, 1), generator=generator)
    latent = latent + wrong * torch.randn(latent.shape, generator=generator)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        decoded = model.decode(latent / SCALE).sample.float()
    loss = F.l1_loss(decoded, image)
    for axis in (2, 3):  # differences between neighbours: edges stay sharp
        loss = loss + F.l1_loss(decoded.diff(dim=axis), image.diff(dim=axis))
    if embedding is not None:
        # The same face must stay the same face: L1 alone blurs eyes and mouths away.
        with torch.autocast("cpu", dtype=torch.bfloat16):
            drawn = embedding(face_chips(decoded[:FACES]))
            with torch.no_grad():
                true = embedding(face_chips(image[:FACES]))
        loss = loss + 0.3 * (drawn.float() - true.float()).pow(2).sum(1).mean()
    return loss


def face_chips(images: Tensor) -> Tensor:
    """Enlarge aligned pictures (N, 3, S, S) in -1..1 to the embedding's 150 px chips, 0..255, with
    a margin."""
    margin = images.shape[-1] * 3 // 32
    padded = F.pad((images + 1) * 127.5, (margin,) * 4, mode="replicate")
    return F.interpolate(padded, (150, 150), mode="bilinear", align_corners=False)


@torch.no_grad()
def encode(model: AutoencoderTiny, pixels: Tensor) -> Tensor:
    """Encode uint8 pictures (N, 3, S, S) to the latents that diffuse, float32, of unit mean
    square."""
    return model.encode(to_unit(pixels)).latents * SCALE


@torch.no_grad()
def decode(model: AutoencoderTiny, latents: Tensor) -> Tensor:
    """Decode latents to uint8 pictures (N, 3, S, S)."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return to_pixels(model.decode(latents / SCALE).sample)


def _show(model: AutoencoderTiny, build: Path) -> None:
    """Draw held-out pictures above what comes back."""
    held = read_pictures(build / "heldout").pixels[:36]
    back = decode(model, encode(model, held))
    sheet([held[:18], back[:18], held[18:], back[18:]], build / "sheets/autoencoder.png")
