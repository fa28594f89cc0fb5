"""Judge parts of `tiny` on real people whom nothing has learned from: what the autoencoder keeps of
them.

By every recogniser that is there; FaceRes, which nothing is trained on, is fetched first.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from registry.errors import RegistryError
from registry.tiny import TEMPLATE
from registry.tiny.recipe.pictures import to_pixels, to_unit

if TYPE_CHECKING:
    from hdbcli.measure.statistics import Interval
    from registry.metric import Recogniser

SIDE = 128


def judge_autoencoder(
    vae: Path, photos: Path, count: int, noises: Sequence[float], seed: int = 0
) -> Iterator[str]:
    """Send each person's first photo through the autoencoder, with noise of so many deviations of
    each channel on its latents, and look it up among everybody's second photo.

    A small UNet's errors are such a noise: latents that forgive it make another expression of the
    same face, not another face.
    """
    from hdbcli.measure.statistics import bootstrap, look_up

    model = read_autoencoder(vae)
    pairs = read_pairs(photos, count)
    judges = _recognisers()
    first, second = (list(side) for side in zip(*pairs, strict=True))
    truth = {name: torch.from_numpy(each.embed(second)) for name, each in judges.items()}
    pixels = torch.from_numpy(np.stack(first)).permute(0, 3, 1, 2)
    latents = _encode(model, pixels)
    yield f"decode: {_decode_flops(model, latents[:1]) / 1e9:.2f} GFLOP a picture"
    deviation = latents.std((0, 2, 3), keepdim=True)
    for noise in (None, *noises):
        pictures = pixels
        if noise is not None:
            generator = torch.Generator().manual_seed(seed)
            drawn = torch.randn(latents.shape, generator=generator)
            pictures = _decode(model, latents + noise * deviation * drawn)
        what = "the photo itself" if noise is None else f"noise {noise:g}"
        far = (
            10
            * (255.0**2 / (pictures.float() - pixels.float()).square().mean().clamp(1e-9)).log10()
        )
        for name, each in judges.items():
            mine = torch.from_numpy(each.embed(list(pictures.permute(0, 2, 3, 1).numpy())))
            near = torch.from_numpy(each.likeness(mine.numpy(), truth[name].numpy()))
            told = look_up(mine, truth[name])
            yield (
                f"{what}, {name}: found first among {len(pairs)} {_share(bootstrap(told.first))}, "
                f"likeness {_plain(bootstrap(near))}, "
                f"face {mine.isfinite().all(1).float().mean():.1%}, {far:.1f} dB"
            )


def read_autoencoder(folder: Path) -> Any:
    """Load an autoencoder of a stock diffusers class, in float32."""
    import diffusers

    try:
        name = json.loads((folder / "config.json").read_text(encoding="utf-8"))["_class_name"]
        if name not in ("AutoencoderTiny", "AutoencoderKL"):
            raise ValueError(f"{name} is no autoencoder of diffusers that hdb knows")
        return getattr(diffusers, name).from_pretrained(folder, local_files_only=True).eval()
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RegistryError(
            f"{folder} is no folder of an autoencoder ({error}); give the one that holds its "
            "config.json"
        ) from None


def read_pairs(folder: Path, count: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Crop the first two usable photos of the first `count` people who have two."""
    pairs = []
    for _, crops in read_faces(folder):
        if len(crops) > 1:
            pairs.append((crops[0], crops[1]))
        if len(pairs) == count:
            break
    if len(pairs) < 2:
        raise RegistryError(
            f"{folder} holds {len(pairs)} people with two usable photos; two are needed at least"
        )
    return pairs


def read_faces(folder: Path) -> Iterator[tuple[str, list[np.ndarray]]]:
    """Yield each person's name and crops (S, S, 3), as `tiny` draws them, of a folder of people."""
    from hdbcli.errors import HdbError
    from hdbcli.faces.photo import crop_face
    from hdbcli.training.people import photos_by_person

    for name, files in photos_by_person(folder, "*")[0].items():
        crops = []
        for file in files:
            try:
                crops.append(crop_face(file, np.array(TEMPLATE), SIDE).image)
            except HdbError:
                continue  # no face, or two
        yield name, crops


def _recognisers() -> dict[str, Recogniser]:
    from hdbcli.measure.metrics import load_judges
    from registry.plugins import load_metrics

    return load_judges(load_metrics(), "tiny", fetch=True).recognisers


@torch.no_grad()
def _encode(model: Any, pixels: Tensor) -> Tensor:
    parts = [model.encode(to_unit(part)) for part in pixels.split(16)]
    means = [e.latent_dist.mode() if hasattr(e, "latent_dist") else e.latents for e in parts]
    return torch.cat(means)


@torch.no_grad()
def _decode(model: Any, latents: Tensor) -> Tensor:
    return torch.cat([to_pixels(model.decode(part).sample) for part in latents.split(16)])


@torch.no_grad()
def _decode_flops(model: Any, latents: Tensor) -> int:
    """Count the floating-point operations of decoding, two for a multiplication with its sum."""
    with FlopCounterMode(display=False) as counter:
        model.decode(latents)
    return counter.get_total_flops()


def _share(interval: Interval) -> str:
    return f"{interval.mean:.1%} ({interval.low:.1%} to {interval.high:.1%})"


def _plain(interval: Interval) -> str:
    return f"{interval.mean:.3f} ({interval.low:.3f} to {interval.high:.3f})"
