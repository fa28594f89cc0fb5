"""The autoencoder of `tiny`: a closed-form linear encoder to 8 x 8 latents, and a decoder trained
to undo it.

The encoder is the principal components of 8 x 8 patches, written into the strided convolutions of
AutoencoderTiny. On aligned faces it keeps who somebody is better than a jointly trained one did in
an hour (README of the recipe), takes seconds, and never changes: base model and hypernetwork can be
trained while the decoder still is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderTiny
from torch import Tensor, nn

from registry.tiny.recipe.pictures import Pictures, read_pictures, sheet, to_pixels, to_unit
from registry.training import Plan, Step, fit

CHANNELS = 24  # principal components kept of each patch's 192 numbers
PATCH = 8
TEMPER = (
    0.5  # deviations of the components are raised to this power: fine ones are heard, not shouted
)
SCALE = 4.0  # latents that diffuse / latents that the decoder reads: its input is squashed beyond 3
BATCH = 8  # small: the decoder needs steps more than pictures
FACES = 1  # of a batch the face embedding judges: it costs more than the decoder

Embedding = Callable[[Tensor], Tensor]


def new_autoencoder() -> AutoencoderTiny:
    """Build the network: an encoder without blocks is linear; the decoder is deep where it is
    small."""
    return AutoencoderTiny(
        encoder_block_out_channels=(48,) * 4,
        decoder_block_out_channels=(48,) * 4,
        num_encoder_blocks=(0, 0, 0, 0),
        num_decoder_blocks=(3, 3, 3, 1),
        latent_channels=CHANNELS,
        upsampling_scaling_factor=2,
        scaling_factor=SCALE,
    )


def train_autoencoder(build: Path, plan: Plan, embedding: Embedding | None) -> Iterator[Step]:
    """Write the encoder, then train the decoder; resumable."""
    pictures = read_pictures(build / "people")
    torch.manual_seed(plan.seed)
    model = new_autoencoder().to(memory_format=torch.channels_last)
    write_encoder(model, pictures.pixels[:: max(1, len(pictures.pixels) // 8192)])
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


@torch.no_grad()
def write_encoder(model: AutoencoderTiny, pixels: Tensor) -> None:
    """Write the principal components of the patches of `pixels` into the encoder's convolutions.

    Two strided convolutions only rearrange (2 x 2 pixels to channels, twice); the third projects.
    The encoder maps -1..1 to 0..1 first, which the projection undoes.
    """
    patches = F.unfold(to_unit(pixels).contiguous(), PATCH, stride=PATCH).transpose(1, 2)
    patches = patches.reshape(-1, 3 * PATCH * PATCH).double()
    mean = patches.mean(0)
    variance, vectors = torch.linalg.eigh(torch.cov(patches.T))
    variance, vectors = variance.flip(0)[:CHANNELS], vectors.flip(1)[:, :CHANNELS]
    vectors = vectors * vectors.sum(0).sign()  # the sign of an eigenvector is nobody's: fix it
    tempered = variance ** (TEMPER / 2)
    tempered = tempered / tempered.pow(2).mean().sqrt() / SCALE
    project = (
        vectors / variance.sqrt() * tempered
    ).T.float()  # (k, 192), patches in (c, y, x) order
    first, *strided, last = model.encoder.layers
    for layer in (first, *strided, last):
        layer.weight.zero_()
    first.bias.zero_(), last.bias.zero_()
    for channel in range(3):
        first.weight[channel, channel, 1, 1] = 1
    width = 3
    for layer in strided[:2]:
        _space_to_depth(layer, width)
        width *= 4
    # Patches are (c, y, x), each of y and x three binary digits, highest first. The lowest digits
    # were
    # folded into channels first, then the middle ones; the highest are taps of this convolution.
    weight = project.view(CHANNELS, 3, 2, 2, 2, 2, 2, 2).permute(0, 1, 4, 7, 3, 6, 2, 5)
    strided[2].weight[:CHANNELS, :, 1:, 1:] = 2 * weight.reshape(CHANNELS, 48, 2, 2)
    for i in range(CHANNELS):
        last.weight[i, i, 1, 1] = 1
    last.bias.copy_(-project.sum(1) - project @ mean.float())


def _space_to_depth(layer: nn.Conv2d, width: int) -> None:
    """Make a strided 3 x 3 convolution copy each 2 x 2 square of `width` channels into 4 x
    `width`."""
    for channel in range(width):
        for y in range(2):
            for x in range(2):
                layer.weight[channel * 4 + y * 2 + x, channel, 1 + y, 1 + x] = 1


def _loss(
    model: AutoencoderTiny,
    pictures: Pictures,
    embedding: Embedding | None,
    generator: torch.Generator,
) -> Tensor:
    pick = torch.randint(len(pictures.pixels), (BATCH,), generator=generator)
    image = to_unit(pictures.pixels[pick])
    latent = encode(model, pictures.pixels[pick])
    # Latents that were sampled are never exact: train on slightly wrong ones.
    latent = latent + 0.05 * torch.randn(latent.shape, generator=generator)
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
