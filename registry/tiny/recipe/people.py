"""Render the people that `tiny` learns from: a folder per person, a picture per style."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np

from registry.tiny.recipe.assets import Assets
from registry.tiny.recipe.draw import Renderer
from registry.tiny.recipe.head import Head, slider_signs
from registry.tiny.recipe.person import sample_person
from registry.tiny.recipe.styles import CAPTIONS, STYLED, render_style

# Seeds of people kept out of every training step; the two ranges never meet.
HELD_OUT_SEED = 900_000
PORTRAITS, STYLES_EACH = 3, 3


def render_people(
    assets: Assets, out: Path, seeds: range, size: int, workers: tuple[int, int] = (0, 1)
) -> Iterator[tuple[int, float]]:
    """Render each seed's person into `out/SEED/`, skipping those done; yield (people done,
    seconds).

    `workers` is (this one, how many): several processes share the seeds without talking.
    Held-out people get every style twice, so that each style has its own true pictures to compare
    with.
    """
    head = Head(assets, assets.meshes.parent.parent / "targets.npz")
    renderer = Renderer(head, assets.materials, size)
    signs = slider_signs(head)
    start = time.perf_counter()
    for count, seed in enumerate(seeds[workers[0] :: workers[1]], 1):
        folder = out / f"{seed:06d}"
        if not folder.is_dir():
            beside = out / f".{seed:06d}.part"
            beside.mkdir(parents=True, exist_ok=True)
            person = sample_person(seed, signs)
            rng = np.random.default_rng([seed, 3])
            for style, take in _takes(seed, rng):
                picture = render_style(renderer, person, style, rng)
                cv2.imwrite(str(beside / f"{style}-{take}.png"), picture[:, :, ::-1])
                if style in STYLED:
                    (beside / f"{style}-{take}.txt").write_text(CAPTIONS[style] + "\n")
            renderer.forget(person)
            os.replace(beside, folder)
        yield count, time.perf_counter() - start


def render_photos(
    assets: Assets, out: Path, seeds: range, size: int
) -> Iterator[tuple[int, float]]:
    """Render two photos of each held-out person as a camera takes them: larger, wider, not cropped.

    They test hdb from the photo file on: detector, crop, prediction. `out/SEED/photo-K.jpg`.
    """
    head = Head(assets, assets.meshes.parent.parent / "targets.npz")
    renderer = Renderer(head, assets.materials, size, supersample=2)
    signs = slider_signs(head)
    start = time.perf_counter()
    for count, seed in enumerate(seeds, 1):
        person = sample_person(seed, signs)
        rng = np.random.default_rng([seed, 5])
        folder = out / f"{seed:06d}"
        folder.mkdir(parents=True, exist_ok=True)
        for take in range(2):
            picture = render_style(renderer, person, "photo", rng)
            quality = [cv2.IMWRITE_JPEG_QUALITY, 90]
            cv2.imwrite(str(folder / f"photo-{take}.jpg"), picture[:, :, ::-1], quality)
        renderer.forget(person)
        yield count, time.perf_counter() - start


def _takes(seed: int, rng: np.random.Generator) -> list[tuple[str, int]]:
    if seed >= HELD_OUT_SEED:
        return [(style, take) for style in ("portrait", *STYLED) for take in range(2)]
    styles = rng.choice(len(STYLED), STYLES_EACH, replace=False)
    return [("portrait", take) for take in range(PORTRAITS)] + [(STYLED[i], 0) for i in styles]
