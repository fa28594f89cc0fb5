"""Measure whether two pictures show one person: embeddings of the faces on them, by dlib's
recogniser unless it is another's that is asked for. N is the number of pictures.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from hdbcli.faces.dlib import Dlib, load_dlib
from hdbcli.faces.photo import align, find_faces
from hdbcli.faces.recogniser import BATCH, Recogniser
from hdbcli.faces.sface import load_sface

SAME_PERSON = 0.5  # distance below which two pictures are taken for one person

_REMEMBERED = 4096  # pictures
_SEEN: dict[bytes, np.ndarray | None] = {}


def recognisers(device: str = "cpu") -> tuple[Recogniser, ...]:
    """Return those whose word on likeness is learned from, dlib's first; on the CPU instead of a
    device that cannot cut chips."""
    device = "cpu" if device.startswith("mps") else device
    return load_dlib(device), load_sface(device)


def traits(images: Tensor, places: np.ndarray) -> Tensor:
    """Return what the recognisers say of aligned crops (B, 3, S, S) in -1..1, one after the other:
    (B, 256). The five points lie at `places` (5, 2) in 0..1."""
    told = (each.embed_aligned(images, places) for each in recognisers(str(images.device)))
    return torch.cat(list(told), 1)


def embed(images: Sequence[np.ndarray]) -> Tensor:
    """Embed the largest face of each RGB picture (H, W, 3) uint8, aligned by its own landmarks:
    (N, 128); a row of NaN where the detector finds no face."""
    return at_landmarks(images, Dlib.template / Dlib.side, Dlib.side, load_dlib(), 128)


def at_landmarks(
    images: Sequence[np.ndarray],
    template: np.ndarray,
    size: int,
    model: Callable[[Tensor], Tensor],
    width: int,
) -> Tensor:
    """Align the largest face of each picture (H, W, 3) uint8 to a recogniser's `template` (5, 2),
    `size` pixels square, and embed it with `model`: (N, width).

    A picture in which the detector finds no face gets a row of NaN: whoever judges counts it as
    a miss.
    """
    told = torch.full((len(images), width), torch.nan)
    chips = {}
    for index, image in enumerate(images):
        if (points := landmarks(image)) is not None:
            chips[index] = align(image, points, template, size)
    if chips:
        pictures = torch.from_numpy(np.stack(list(chips.values()))).permute(0, 3, 1, 2)
        with torch.no_grad():
            rows = [model(part.float()) for part in pictures.split(BATCH)]
        told[list(chips)] = torch.cat(rows)
    return told


def landmarks(image: np.ndarray) -> np.ndarray | None:
    """Return the five points (5, 2) of the largest face of a picture, or None without a face.

    The last few thousand answers are kept: looking takes longer than embedding, and several
    recognisers judge the same pictures.
    """
    key = hashlib.sha256(repr(image.shape).encode() + image.tobytes()).digest()
    if key not in _SEEN:
        if len(_SEEN) >= _REMEMBERED:
            _SEEN.clear()
        faces = find_faces(image)
        _SEEN[key] = faces[0].landmarks if faces else None
    return _SEEN[key]


def found(embeddings: Tensor) -> Tensor:
    """Return which embeddings (..., D) are of a face that was found: (...)."""
    return embeddings.isfinite().all(-1)
