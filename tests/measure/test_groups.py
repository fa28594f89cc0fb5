"""Groups of faces: an angle by its definition, and what goes without the second judge."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
import torch

from hdbcli.measure import groups
from registry.errors import HdbError
from registry.tiny import TEMPLATE

POINTS = np.array(TEMPLATE)


def face(lightness: float, yellow: float) -> np.ndarray:
    """A crop with cheeks of one colour, on white."""
    lab = np.full((1, 1, 3), (lightness, 12.0, yellow), np.float32)
    crop = np.full((128, 128, 3), 255, np.uint8)
    crop[60:100, 20:108] = (255 * cv2.cvtColor(lab, cv2.COLOR_LAB2RGB)).round().astype(np.uint8)
    return crop


@pytest.mark.parametrize(
    ("lightness", "yellow", "angle", "word"),
    [
        (70, 20, 45, "light"),
        (60, 17.3, 30, "light"),
        (56, 22.4, 15, "medium"),
        (40, 17.3, -30, "dark"),
    ],
)
def test_the_angle_of_the_cheeks_says_the_complexion(
    lightness: float, yellow: float, angle: float, word: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    crop = face(lightness, yellow)
    assert groups.typology(crop, POINTS) == pytest.approx(angle, abs=1.5)
    monkeypatch.setattr(groups, "male", lambda crops: torch.tensor([0.9, 0.1, torch.nan]))
    told = groups.groups([crop] * 3, POINTS)
    assert told == {"complexion": (word,) * 3, "sex": ("men", "women", "unknown")}


def test_without_the_second_judge_complexion_alone_is_told(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def missing(crops: object) -> None:
        raise HdbError("not fetched yet")

    monkeypatch.setattr(groups, "male", missing)
    assert groups.groups([face(70, 20)], POINTS) == {"complexion": ("light",)}
