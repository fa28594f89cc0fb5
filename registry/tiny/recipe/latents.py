"""The training pictures as latents, computed once: the teacher's for the autoencoder to learn, and
the autoencoder's own for the base model.

The teacher's channels are shifted and scaled to mean 0 and deviation 1 over photographs of 128 px,
the same at every size, so that what diffuses has the deviation that its noise has. Both are kept in
the work folder: a training that was cut off starts again within seconds.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderTiny
from safetensors.torch import load_file
from torch import Tensor

from registry.checkpoints.safetensors import save_tensors
from registry.errors import HdbError
from registry.tiny.recipe.photographs import KINDS, read_photographs
from registry.tiny.recipe.pictures import STYLES, as_images, half
from registry.tiny.recipe.teacher import load_teacher

# Groups of captions: a style each, and two more for portraits that are no photographs of people.
GROUPS = (*STYLES, "cinematic", "render")
PORTRAIT = STYLES.index("portrait")
MEASURED = 512  # photographs that mean and deviation are taken from
# Image models' pictures of nobody are fewer and more varied, so they are drawn more often.
SHARES = {"person": 1.0, "nobody": 1.5, "render": 1.0}
PLAIN = 0.3  # share of nobodies' portraits that are captioned as photographs, for who is in them
AT_ONCE = 50  # pictures


@dataclass(frozen=True)
class Latents:
    """N pictures: `values` (2, N, c, h, w) float16, mirrored in the second half; style and kind."""

    values: Tensor
    styles: Tensor  # (N,) index into STYLES
    kinds: Tensor  # (N,) index into KINDS

    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        """Draw indices (count,): half of them portraits, half in styles, where there are any."""
        portrait = self.styles == PORTRAIT
        share = torch.tensor([SHARES[kind] for kind in KINDS])[self.kinds]
        plain, styled = share * portrait, share * ~portrait
        weights = sum(each / each.sum() for each in (plain, styled) if each.any())
        return torch.multinomial(torch.as_tensor(weights), count, True, generator=generator)

    def captions(self, pick: Tensor, generator: torch.Generator) -> Tensor:
        """Return the group of captions (index into GROUPS) that each of the pictures gets."""
        groups, kinds = self.styles[pick].clone(), self.kinds[pick]
        portrait = groups == PORTRAIT
        told = torch.rand(len(pick), generator=generator) >= PLAIN
        for kind, group in (("nobody", "cinematic"), ("render", "render")):
            groups[portrait & told & (kinds == KINDS.index(kind))] = GROUPS.index(group)
        return groups


@dataclass(frozen=True)
class Taught:
    """M pictures (M, 3, S, S) uint8 and the teacher's normalised latents of them (M, c, h, w)."""

    pixels: Tensor
    latents: Tensor


def read_taught(build: Path, side: int, teacher: Path, device: str) -> Taught:
    """Return every portrait and one in as many styled pictures, scaled to `side` px, with the
    teacher's latents."""
    pictures = read_photographs(build)
    portraits = (pictures.styles == PORTRAIT).nonzero().flatten()
    styled = (pictures.styles != PORTRAIT).nonzero().flatten()
    chosen = torch.cat([portraits, styled[:: max(1, len(styled) // len(portraits))]])
    pixels = scaled(pictures.pixels[chosen], side)
    kept = build / f"taught-{side}.safetensors"
    if not kept.exists():
        encoder = load_teacher(teacher).to(device)

        def encode(part: Tensor) -> Tensor:
            return encoder(as_images(part.to(device)) / 2 + 0.5)

        scale = build / "scale.safetensors"
        if not scale.exists():
            some = portraits[torch.linspace(0, len(portraits) - 1, MEASURED).long()]
            latents = _encoded(pictures.pixels[some], encode)
            found = {
                "mean": latents.mean((0, 2, 3), keepdim=True),
                "deviation": latents.std((0, 2, 3), keepdim=True),
            }
            save_tensors(found, scale, {"format": "pt"})
        mean, deviation = (load_file(scale)[key] for key in ("mean", "deviation"))
        latents = ((_encoded(pixels, encode) - mean) / deviation).half()
        save_tensors({"latents": latents.contiguous()}, kept, {"format": "pt"})
    return Taught(pixels.to(device), load_file(kept)["latents"].to(device))


def read_latents(build: Path, side: int, device: str) -> Latents:
    """Return every picture that is not held out, and its mirror image, as the autoencoder in `vae`
    encodes them at `side` px. HdbError where it was not trained yet."""
    pictures = read_photographs(build)
    kept = build / f"latents-{side}.safetensors"
    if not kept.exists():
        model = read_autoencoder(build).to(device)

        def encode(part: Tensor) -> Tensor:
            with half(model.device):
                return model.encode(as_images(scaled(part.to(device), side))).latents.float()

        both = [_encoded(each, encode) for each in (pictures.pixels, pictures.pixels.flip(-1))]
        save_tensors({"values": torch.stack(both).half().contiguous()}, kept, {"format": "pt"})
    return Latents(load_file(kept)["values"], pictures.styles, pictures.kinds)


def read_autoencoder(build: Path) -> AutoencoderTiny:
    """Load the autoencoder that was trained. HdbError if there is none."""
    folder = build / "vae"
    if not (folder / "config.json").exists():
        raise HdbError(f"no autoencoder in {folder}; run the autoencoder step first")
    model = AutoencoderTiny.from_pretrained(folder).eval().requires_grad_(False)
    return model.to(memory_format=torch.channels_last)


def scaled(pixels: Tensor, side: int) -> Tensor:
    """Scale uint8 pictures (N, 3, S, S) down to `side` px."""
    if pixels.shape[-1] == side:
        return pixels
    parts = [F.interpolate(p.float(), (side, side), mode="area") for p in pixels.split(AT_ONCE)]
    return torch.cat(parts).round().to(torch.uint8)


@torch.no_grad()
def _encoded(pixels: Tensor, encode: Callable[[Tensor], Tensor]) -> Tensor:
    return torch.cat([encode(part).cpu() for part in pixels.split(AT_ONCE)])
