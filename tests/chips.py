"""Chips of a recogniser, and likeness by dlib's, as tests compare them."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from hdbcli.faces.dlib import Dlib
from hdbcli.faces.photo import align
from hdbcli.faces.recogniser import Recogniser


def chip(
    rgb: np.ndarray, landmarks: np.ndarray, recogniser: Recogniser | type[Recogniser] = Dlib
) -> np.ndarray:
    """Cut the face with these five points (5, 2) out of a picture as the recogniser wants it."""
    return align(rgb, landmarks, recogniser.template / recogniser.side, recogniser.side)


def distance(a: Tensor, b: Tensor) -> float:
    """Return the Euclidean distance of two embeddings (128,).

    Measured on rendered people: one person 0.28 +- 0.11, two 0.65 +- 0.08; on photos 0.31 to 0.44
    and 0.73 to 0.87.
    """
    return float((a - b).norm())


def likeness(a: Tensor, b: Tensor) -> float:
    """Return 1 - distance, from 0 to 1."""
    return max(0.0, 1 - distance(a, b))
