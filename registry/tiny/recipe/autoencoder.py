"""Train the autoencoder of `tiny`: a small stock network that speaks the teacher's latents.

The encoder learns the teacher's latents, normalised channel by channel, by their mean square error.
The decoder learns the true pictures from those latents and from the encoder's own, some with noise
on them, since what a base model draws is never exact: loss = L1 of pixels + L1 of differences
between neighbours + relative L1 of the first features of the face recogniser, which see the edges
of eyes and hair (the perceptual loss of Johnson et al. 2016, with a network that knows faces). The
decoder sees windows of half a side, which costs a quarter and shows it four times as many pictures.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderTiny
from diffusers.models.autoencoders.vae import AutoencoderTinyBlock
from torch import Tensor, nn

from hdbcli.faces.dlib import load_dlib
from hdbcli.training.loop import Plan, Step, averaged, averages_of, fit
from registry.pixels import to_pixels
from registry.tiny.recipe.latents import PORTRAIT, read_taught
from registry.tiny.recipe.photographs import read_photographs
from registry.tiny.recipe.pictures import as_images, half, sheet
from registry.tiny.recipe.teacher import CHANNELS

SIDE = 128  # pixels of a picture
SIDES = (128, 64)  # of what the encoder learns: the base model sees both
WINDOW = 8  # latents of a window's side
ENCODED = 8  # one in so many of a batch of windows is a whole picture for the encoder
NOISE = 0.75  # of a channel's deviation, at most
SHARP = 1.0  # weight of differences between neighbours
FEATURES = 0.1  # weight of the recogniser's features
BLOCKS = (2, 6)  # of the recogniser, whose features are compared: 32 and 64 channels
SCALE = 1.375  # of a face in the recogniser's input to one in ours
SHOWN_EVERY = 250  # steps


def new_autoencoder() -> AutoencoderTiny:
    """Build the untrained network: 1.7 GFLOP to decode a picture of 128 px.

    At full size nothing is left but two convolutions, which is where half of the work would be. The
    residual blocks start as identities, or so deep a network without norms would not start at all.
    """
    model = AutoencoderTiny(
        encoder_block_out_channels=(48,) * 4,
        decoder_block_out_channels=(40,) * 4,
        num_encoder_blocks=(0, 1, 3, 4),
        num_decoder_blocks=(4, 3, 2, 0),
        latent_channels=CHANNELS,
        upsampling_scaling_factor=2,
        scaling_factor=1.0,
    )
    for block in model.modules():
        if isinstance(block, AutoencoderTinyBlock):
            nn.init.zeros_(block.conv[-1].weight)
            nn.init.zeros_(block.conv[-1].bias)
    return model.to(memory_format=torch.channels_last)


def reconstruction(made: Tensor, true: Tensor) -> Tensor:
    """Return how far windows (B, 3, S, S) in -1..1 are from the true ones: the decoder's loss."""
    far = F.l1_loss(made, true) + FEATURES * feature_distance(made, true)
    for axis in (2, 3):
        far = far + SHARP * F.l1_loss(made.diff(dim=axis), true.diff(dim=axis))
    return far


def feature_distance(made: Tensor, true: Tensor) -> Tensor:
    """Return how far the recogniser's first features of two batches of windows (B, 3, S, S) lie
    apart: mean |made - true| / mean |true|, summed over `BLOCKS`."""
    pictures = F.interpolate(torch.cat([made, true]), scale_factor=SCALE, mode="bilinear")
    features = load_dlib(str(made.device)).features((pictures + 1) * 127.5)
    far = made.new_zeros(())
    for index, x in enumerate(islice(features, max(BLOCKS) + 1)):
        if index in BLOCKS:
            mine, theirs = x.chunk(2)
            far = far + F.l1_loss(mine, theirs) / theirs.abs().mean()
    return far


def train_autoencoder(
    build: Path, plan: Plan, batch: int, device: str, teacher: Path
) -> Iterator[Step]:
    """Train encoder and decoder; resumable. Write `vae/` and a sheet of pictures held out."""
    taught = {side: read_taught(build, side, teacher, device) for side in SIDES}
    torch.manual_seed(plan.seed)
    model = new_autoencoder().to(device)
    parameters = dict(model.named_parameters())
    averages = averages_of(parameters)

    def drawn(side: int, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        pick = torch.randint(len(taught[side].pixels), (count,), generator=generator).to(device)
        return as_images(taught[side].pixels[pick]), taught[side].latents[pick].float()

    def losses(generator: torch.Generator) -> Iterator[Tensor]:
        with half(torch.device(device)):
            far = torch.zeros((), device=device)
            for side in SIDES[::-1]:  # as many pixels of each; those of the larger are decoded too
                count = max(1, batch // ENCODED * (SIDE // side) ** 2)
                images, latents = drawn(side, count, generator)
                own = model.encode(images).latents
                far = far + F.mse_loss(own.float(), latents)
            more, taught_ones = drawn(SIDE, batch - count, generator)
            images, latents = torch.cat([images, more]), torch.cat([own.float(), taught_ones])
            x, y = torch.randint(latents.shape[-1] - WINDOW + 1, (2,), generator=generator).tolist()
            seen = latents[:, :, y : y + WINDOW, x : x + WINDOW]
            true = images[:, :, 8 * y : 8 * (y + WINDOW), 8 * x : 8 * (x + WINDOW)]
            level = NOISE * torch.rand(batch, 1, 1, 1, generator=generator)
            noise = level * torch.randn(seen.shape, generator=generator)
            made = model.decode(seen + noise.to(device)).sample
        yield far + reconstruction(made.float(), true)

    optimizer = torch.optim.AdamW(
        parameters.values(), lr=plan.lr, weight_decay=0.0, betas=(0.9, 0.99)
    )
    file = build / "autoencoder.safetensors"
    for step in fit(parameters, losses, optimizer, plan, averages, file):
        yield step
        if step.number % SHOWN_EVERY == 0 or step.number == step.steps:
            with averaged(parameters, averages):
                show(model, build)
                model.save_pretrained(build / "vae")


@torch.no_grad()
def show(model: AutoencoderTiny, build: Path) -> None:
    """Draw pictures held out above what comes back of them, without and with noise on latents."""
    pictures = read_photographs(build, held=True)
    held = pictures.pixels[pictures.styles == PORTRAIT][::10][:12]
    latents = model.encode(as_images(held.to(model.device))).latents
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(0)).to(latents)
    back = [to_pixels(model.decode(x).sample).cpu() for x in (latents, latents + NOISE * noise)]
    sheet([held, *back], build / "sheets/autoencoder.png")
