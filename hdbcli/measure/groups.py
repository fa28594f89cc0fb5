"""Say which groups people's faces belong to, to see whom a method serves worse. Estimates, for
means over groups: nobody is told what a network makes of them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import cv2
import numpy as np
import torch

from hdbcli.measure.faceres import male
from registry.errors import HdbError

# Degrees of the individual typology angle (Chardon et al. 1991): lighter than the first, darker
# than the second.
LIGHT, DARK = 28.0, 10.0
REACH = 0.04  # of a crop's side: half of the patch that is looked at on each cheek


def groups(crops: Sequence[np.ndarray], template: np.ndarray) -> Mapping[str, tuple[str, ...]]:
    """Return the group of each face by what it is grouped by: complexion, and sex where FaceRes was
    fetched. `crops` (S, S, 3) RGB are aligned to `template` (5, 2) in 0..1."""
    found = {"complexion": tuple(_complexion(typology(crop, template)) for crop in crops)}
    try:
        likely = male(crops)
    except HdbError:
        return found
    words = torch.where(likely.isnan(), 2, (likely > 0.5).long())
    return found | {"sex": tuple(("women", "men", "unknown")[word] for word in words.tolist())}


def typology(crop: np.ndarray, template: np.ndarray) -> float:
    """Return the individual typology angle of the cheeks in degrees, the higher the lighter:
    atan((L - 50) / b) of the median colour in CIELAB. Light and camera move it too."""
    side = len(crop)
    eyes, mouth = template[:2], template[3:]
    patches = []
    for x, y in (0.5 * (eyes + mouth) * side).round().astype(int):
        reach = max(1, round(REACH * side))
        patches.append(crop[y - reach : y + reach, x - reach : x + reach].reshape(-1, 3))
    colour = np.median(np.concatenate(patches), axis=0).astype(np.float32)[None, None] / 255
    lightness, _, yellow = cv2.cvtColor(colour, cv2.COLOR_RGB2LAB)[0, 0].tolist()
    return math.degrees(math.atan2(lightness - 50, max(yellow, 1e-3)))


def _complexion(angle: float) -> str:
    return "light" if angle > LIGHT else "dark" if angle < DARK else "medium"
