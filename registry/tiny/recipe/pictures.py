"""Read rendered pictures back: pixels, style and person of every file in a folder per person."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import torch
from torch import Tensor

from hdbcli.model.contact_sheet import contact_sheet
from hdbcli.model.device import autocast
from registry.errors import HdbError
from registry.pixels import to_unit
from registry.tiny.recipe.assets import read_image
from registry.tiny.recipe.styles import CAPTIONS

STYLES = tuple(CAPTIONS)


@dataclass(frozen=True)
class Pictures:
    """N pictures: `pixels` (N, 3, S, S) uint8, `styles` (N,) index into STYLES, `people` (N,)
    seeds."""

    pixels: Tensor
    styles: Tensor
    people: Tensor

    def some(self, count: int, seed: int) -> Pictures:
        """Choose that many at random, or all."""
        order = torch.randperm(len(self.pixels), generator=torch.Generator().manual_seed(seed))
        chosen = order[:count].sort().values
        return Pictures(self.pixels[chosen], self.styles[chosen], self.people[chosen])


def style_of(file: Path) -> str:
    """Return the style of a rendered picture, `STYLE-K.png`."""
    return file.stem.split("-")[0]


def read_pictures(folder: Path) -> Pictures:
    """Read `folder/SEED/STYLE-K.png`, sorted, so that the order is the same on every machine."""
    files = sorted(folder.glob("[0-9]*/*.png"))
    if not files:
        raise HdbError(f"no rendered pictures in {folder}; run the render step first")
    pixels = np.stack([read_image(f, cv2.IMREAD_COLOR)[:, :, ::-1] for f in files])
    styles = [STYLES.index(style_of(f)) for f in files]
    people = [int(f.parent.name) for f in files]
    tensor = torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()
    return Pictures(tensor, torch.tensor(styles), torch.tensor(people))


def half(device: torch.device) -> AbstractContextManager:
    """Compute in bfloat16 where the device does that fast, else in float32."""
    return autocast(device.type)


def as_images(pixels: Tensor) -> Tensor:
    """Map uint8 to -1..1, channels last: the layout that convolutions on a CPU like."""
    return to_unit(pixels).to(memory_format=torch.channels_last)


def photo_rows(photos: list[Path], drawn: Path, size: int) -> list[Tensor]:
    """Read a row for each photo NAME.*: the photo itself, then `NAME-*.png` of each folder in
    `drawn`."""
    rows = []
    for photo in photos:
        files = [photo, *sorted(drawn.glob(f"*/{photo.stem}-*.png"))]
        images = [read_image(f, cv2.IMREAD_COLOR)[:, :, ::-1] for f in files]
        images = [cv2.resize(i, (size, size), interpolation=cv2.INTER_AREA) for i in images]
        rows.append(torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2))
    return rows


def sheet(rows: list[Tensor], path: Path, titles: Sequence[str] = ()) -> None:
    """Save rows of (N, 3, S, S) uint8 pictures as one PNG to look at, with a title above each
    column."""
    grid = contact_sheet([list(row.permute(0, 2, 3, 1).numpy()) for row in rows], titles)
    path.parent.mkdir(parents=True, exist_ok=True)
    cv2.imwrite(str(path), grid[:, :, ::-1])
