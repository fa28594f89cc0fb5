"""Say what a face in a photo seems to be hidden by, and whether it was photographed at all.

Simple measures of an aligned face's colours (CIE L*a*b*) and edges, each with a threshold that
hardly a photo passes: of 652, 226 of which the thresholds were chosen on, two whose eyes are plain
to see were told of sunglasses, and none of anything else but being black-and-white. Found are half
of 31 sunglasses (not those that are light or mirror), 9 of 10 masks drawn over photos (7 of 10 of a
skin-like colour), and of what the recipe of `tiny` paints all marble, most bark and pop art, no
bronze and no 3D characters.
"""

from __future__ import annotations

import functools

import cv2
import numpy as np

SIDE = 96  # pixels: coarser than most faces in photos, so that sharp and soft photos are alike
# Eyes, nose tip and mouth corners in the unit square, in YuNet's order.
TEMPLATE = np.array([[0.33, 0.42], [0.67, 0.42], [0.5, 0.63], [0.36, 0.77], [0.64, 0.77]])

_BLUR = 0.72  # pixels, against noise
# Ellipses: x and y of the middle, half of the width and of the height.
_EYES = ((0.33, 0.423, 0.055, 0.03), (0.67, 0.423, 0.055, 0.03))
_BELOW_EYES = ((0.33, 0.485, 0.055, 0.025), (0.67, 0.485, 0.055, 0.025))
_CHEEKS = ((0.27, 0.62, 0.05, 0.05), (0.73, 0.62, 0.05, 0.05))
_BRIDGE, _NOSE = (0.5, 0.48, 0.03, 0.06), (0.5, 0.56, 0.035, 0.05)
_TIP, _LIP = (0.5, 0.64, 0.04, 0.03), (0.5, 0.705, 0.05, 0.02)
_MOUTH, _CHIN = (0.5, 0.775, 0.1, 0.04), (0.5, 0.88, 0.06, 0.03)
_FACE, _LOWER = (0.5, 0.58, 0.27, 0.33), (0.5, 0.72, 0.24, 0.19)

_EYE_EDGES, _DARK_BELOW = 0.38, 0.6
_OTHER_COLOUR, _OTHER_SHARE, _ALIKE = 7.0, 0.5, 3.0
_ONE_TONE, _BRIGHT = 1.0, 0.7
_HARD_EDGES = 18.0


def doubts_about(face: np.ndarray) -> list[str]:
    """Return what is doubtful about a face (SIDE, SIDE, 3) uint8 RGB that lies as TEMPLATE says."""
    soft = cv2.GaussianBlur(face.astype(np.float32) / 255, (0, 0), _BLUR)
    lab = cv2.cvtColor(soft, cv2.COLOR_RGB2LAB)
    if hard_edges(lab) > _HARD_EDGES:  # in which the others would see what is not there
        return [
            "the face looks drawn, with hard edges: expect less likeness, and portraits that look "
            "drawn, try a photo"
        ]
    said = []
    if mouth_covered(lab):
        said.append(
            "mouth and nose seem covered, as by a mask: what is hidden will be made up, try a "
            "photo without it"
        )
    if eyes_covered(lab):
        said.append(
            "the eyes cannot be seen, as behind sunglasses: what is hidden will be made up, try a "
            "photo without them"
        )
    if one_tone(soft) < _ONE_TONE:
        said.append(
            "the face has one tone, as in a black-and-white photo, a drawing or a statue: "
            "portraits will have it too, try a photo in colour"
        )
    return said


def eyes_covered(lab: np.ndarray) -> bool:
    """Tell whether there are hardly edges where the eyes are, and it is dark below them too, which
    the rim of an eye is not."""
    edges, light = _edges(lab), lab[..., 0]
    mouth = max(_percentile(edges, _MOUTH, 80), 2.0)
    eyes = max(_percentile(edges, eye, 80) for eye in _EYES)
    nose = _percentile(light, _NOSE, 50)
    below = max(
        _percentile(light, part, 50) / max(_percentile(light, cheek, 50), nose, 5.0)
        for part, cheek in zip(_BELOW_EYES, _CHEEKS, strict=True)
    )
    return eyes / mouth < _EYE_EDGES and below < _DARK_BELOW


def mouth_covered(lab: np.ndarray) -> bool:
    """Tell whether nose tip, lips and chin have one colour, and the skin above another."""
    skin = np.median(np.concatenate([lab[_ellipse(part)] for part in (_BRIDGE, _NOSE)]), 0)[1:]
    parts = [np.median(lab[_ellipse(p)], 0)[1:] for p in (_TIP, _LIP, _MOUTH, _CHIN)]
    apart = min(float(np.hypot(*(part - skin))) for part in parts)
    among = max(float(np.hypot(*(one - other))) for one in parts for other in parts)
    share = apart / max(float(np.hypot(*skin)), 4.0)
    return apart > _OTHER_COLOUR and share > _OTHER_SHARE and apart / max(among, 3.0) > _ALIKE


def one_tone(rgb: np.ndarray) -> float:
    """Return how far colours lie from the best that lightness alone tells of them, a* and b* as
    cubic polynomials of L*: the median distance. In a dark photo all colours lie close, so it is
    brightened first."""
    bright = float(np.percentile(rgb[_ellipse(_FACE)].max(1), 90))
    lab = cv2.cvtColor(
        np.minimum(rgb * max(1.0, _BRIGHT / max(bright, 0.05)), 1), cv2.COLOR_RGB2LAB
    )
    light, *colours = np.moveaxis(lab[_ellipse(_FACE)].astype(np.float64), -1, 0)
    powers = np.stack([(light / 100) ** n for n in range(4)], axis=1)
    rest = [each - powers @ np.linalg.lstsq(powers, each, rcond=None)[0] for each in colours]
    return float(np.median(np.hypot(*rest)))


def hard_edges(lab: np.ndarray) -> float:
    """Return how steep the steepest tenth of nose, mouth and chin is, in levels of L* a pixel:
    above them glasses have edges too."""
    return _percentile(_edges(lab), _LOWER, 90)


def _edges(lab: np.ndarray) -> np.ndarray:
    steps = [cv2.Sobel(lab[..., 0], cv2.CV_32F, *axis, scale=1 / 8) for axis in ((1, 0), (0, 1))]
    return np.hypot(*steps)


def _percentile(values: np.ndarray, part: tuple[float, ...], percent: float) -> float:
    return float(np.percentile(values[_ellipse(part)], percent))


@functools.cache
def _ellipse(part: tuple[float, ...]) -> np.ndarray:
    """Return which pixels (SIDE, SIDE) lie in an ellipse."""
    x, y, wide, high = part
    places = (np.arange(SIDE) + 0.5) / SIDE
    inside: np.ndarray = ((places - x) / wide) ** 2 + ((places[:, None] - y) / high) ** 2 < 1
    return inside
