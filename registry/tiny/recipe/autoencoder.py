"""The autoencoder of `tiny`: principal components of patches, and their exact inverse, both written
down and not trained.

On aligned faces the components keep who somebody is better than a jointly trained encoder did in
an hour (README of the recipe), and they never change: base model and hypernetwork stay right while
the decoder still learns (`decoder.py`).
"""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import AutoencoderTiny
from torch import Tensor

from registry.errors import RegistryError
from registry.tiny.recipe.pictures import half, read_pictures, sheet, to_pixels, to_unit
from registry.tiny.recipe.principal import WIDTH, components, write_decoder, write_encoder

CHANNELS = 16  # principal components kept of each patch's 192 numbers
TEMPER = 0.5  # deviations of the components are raised to this power
SCALE = 8.0  # latents that diffuse / latents that the decoder reads: tanh bends those beyond 1


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


def write_autoencoder(build: Path, seed: int) -> None:
    """Find the components of the rendered pictures; save the network and a sheet."""
    if (build / "pipeline").exists():  # other pictures have other components
        raise RegistryError(
            f"the base model in {build / 'pipeline'} knows the latents of the autoencoder before; "
            "delete it to begin again"
        )
    pictures = read_pictures(build / "people").pixels
    torch.manual_seed(seed)
    model = new_autoencoder(pictures[:: max(1, len(pictures) // 8192)]).eval()
    model.save_pretrained(build / "vae")
    show(model, build)


@torch.no_grad()
def encode(model: AutoencoderTiny, pixels: Tensor) -> Tensor:
    """Encode uint8 pictures (N, 3, S, S) to the latents that diffuse, float32, of unit mean
    square."""
    return model.encode(to_unit(pixels)).latents * SCALE


@torch.no_grad()
def decode(model: AutoencoderTiny, latents: Tensor) -> Tensor:
    """Decode latents to uint8 pictures (N, 3, S, S)."""
    with half(latents.device):
        return to_pixels(model.decode(latents / SCALE).sample)


def show(model: AutoencoderTiny, build: Path) -> None:
    """Draw held-out pictures above what comes back."""
    held = read_pictures(build / "heldout").pixels[:36]
    back = decode(model, encode(model, held.to(model.device))).cpu()
    sheet([held[:18], back[:18], held[18:], back[18:]], build / "sheets/autoencoder.png")
