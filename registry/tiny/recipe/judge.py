"""Judge parts of `tiny` on real people whom nothing has learned from: what the autoencoder keeps of
them, and whether the base draws faces of its own or those it learned from.

By every recogniser that is there; FaceRes, which nothing is trained on, is fetched first.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from registry.errors import HdbError
from registry.pixels import to_pixels
from registry.tiny import SAMPLING, TEMPLATE, load_from
from registry.tiny.recipe.pictures import as_images

if TYPE_CHECKING:
    from hdbcli.measure.statistics import Interval
    from registry.metric import Recogniser

SIDE = 128
_DRAWN_AT_ONCE = 25


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
    judges = recognisers()
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


def judge_base(
    weights: Path,
    photos: Path,
    nobodies: Path | None,
    held_out: int,
    portraits: Mapping[str, int],
    steps: int,
) -> Iterator[str]:
    """Draw portraits of nobody by the base alone: `portraits` of each prompt. Say in how many the
    detector finds a face, and how near the nearest training face is.

    Training faces are those of all people in `photos` but the first `held_out`, and of all
    `nobodies` but every tenth. If portraits lie nearer to them than held-out people do, the base
    remembers faces. Nearness is 1 - likeness, of the first prompt's portraits.
    """
    from hdbcli.faces.embedding import landmarks
    from hdbcli.measure.statistics import bootstrap

    judges = recognisers()
    drawn = {}
    for prompt, count in portraits.items():
        drawn[prompt] = _portraits(weights, prompt, count, steps)
        seen = torch.tensor([float(landmarks(picture) is not None) for picture in drawn[prompt]])
        yield f"{prompt!r}, {count} portraits: face found in {_share(bootstrap(seen))}"
    people = [crops for _, crops in read_faces(photos) if crops]
    held, learned = people[:held_out], [crop for crops in people[held_out:] for crop in crops]
    if nobodies is not None:
        learned += [
            crop
            for i, (_, crops) in enumerate(read_faces(nobodies))
            for crop in crops[:1]
            if i % 10
        ]
    if not held or not learned:
        raise HdbError(
            f"{photos} holds {len(people)} usable people, of whom {held_out} are held out; some "
            "must be held out and some must not"
        )
    first = next(iter(drawn.values()))
    for name, each in judges.items():
        known = each.embed(learned)
        mine, theirs = (
            bootstrap(_nearest(each, pictures, known))
            for pictures in (first, [crops[0] for crops in held])
        )
        verdict = "nothing memorised" if mine.mean >= theirs.mean else "MEMORISED FACES"
        yield (
            f"nearest of {len(learned):,} training faces, {name}: portraits {_plain(mine)} away, "
            f"{len(held)} held-out people {_plain(theirs)}: {verdict}"
        )


def _nearest(judge: Recogniser, pictures: Sequence[np.ndarray], known: np.ndarray) -> Tensor:
    """Return 1 - likeness of each picture with a face to the nearest known face."""
    own = judge.embed(pictures)
    own = own[np.isfinite(own).all(1)]
    return torch.tensor([1 - judge.likeness(each[None], known).max() for each in own])


def _portraits(weights: Path, prompt: str, count: int, steps: int) -> list[np.ndarray]:
    """Draw `count` portraits with seeds from 0."""
    backbone = load_from(weights, "cpu", "float32")
    settings, pictures = replace(SAMPLING, steps=steps), []
    for start in range(0, count, _DRAWN_AT_ONCE):
        seeds = range(start, min(start + _DRAWN_AT_ONCE, count))
        pictures += list(backbone.sample([prompt] * len(seeds), settings, seeds, lambda *_: None))
    return pictures


def read_autoencoder(folder: Path) -> Any:
    """Load an autoencoder of a stock diffusers class, in float32."""
    import diffusers

    try:
        name = json.loads((folder / "config.json").read_text(encoding="utf-8"))["_class_name"]
        if name not in ("AutoencoderTiny", "AutoencoderKL"):
            raise ValueError(f"{name} is no autoencoder of diffusers that hdb knows")
        return getattr(diffusers, name).from_pretrained(folder, local_files_only=True).eval()
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise HdbError(
            f"{folder} is no folder of an autoencoder ({error}); give the one that holds its "
            "config.json"
        ) from None


def read_pairs(folder: Path, count: int, side: int = SIDE) -> list[tuple[np.ndarray, np.ndarray]]:
    """Crop the first two usable photos of the first `count` people who have two."""
    pairs = []
    for _, crops in read_faces(folder, side):
        if len(crops) > 1:
            pairs.append((crops[0], crops[1]))
        if len(pairs) == count:
            break
    if len(pairs) < 2:
        raise HdbError(
            f"{folder} holds {len(pairs)} people with two usable photos; two are needed at least"
        )
    return pairs


def read_faces(folder: Path, side: int = SIDE) -> Iterator[tuple[str, list[np.ndarray]]]:
    """Yield each person's name and crops (S, S, 3), as `tiny` draws them, of a folder of people."""
    from hdbcli.faces.photo import crop_face
    from hdbcli.training.people import photos_by_person
    from registry.errors import HdbError

    for name, files in photos_by_person(folder, "*")[0].items():
        crops = []
        for file in files:
            try:
                crops.append(crop_face(file, np.array(TEMPLATE), side).image)
            except HdbError:
                continue  # no face, or two
        yield name, crops


def recognisers() -> dict[str, Recogniser]:
    """Load every judge of faces there is, after fetching those that can be."""
    from hdbcli.measure.metrics import load_judges
    from registry.plugins import load_metrics

    return load_judges(load_metrics(), "tiny", fetch=True).recognisers


@torch.no_grad()
def _encode(model: Any, pixels: Tensor) -> Tensor:
    parts = [model.encode(as_images(part)) for part in pixels.split(16)]
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
