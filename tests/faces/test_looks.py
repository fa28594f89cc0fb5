"""A face that is covered, or not photographed, gets a warning; a photographed one gets none."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from hdbcli.faces.looks import SIDE, TEMPLATE, doubts_about
from hdbcli.faces.photo import align, crop_face, find_faces, read_photo

HELD_OUT = Path(__file__).parents[1] / "data/heldout"
LARGE = 4 * SIDE  # on which accessories are drawn
EYES, MOUTH, TONE, DRAWN = "eyes cannot be seen", "mouth and nose", "one tone", "looks drawn"
Change = Callable[[np.ndarray], np.ndarray]


@pytest.fixture(scope="module")
def faces(astronaut: Path) -> list[np.ndarray]:
    """Return aligned faces, LARGE pixels wide: the astronaut's and five renders of nobody."""
    paths = [astronaut, *(HELD_OUT / f"90000{i}/photo-0.jpg" for i in (0, 1, 2, 3, 5))]
    pictures = [read_photo(path) for path in paths]
    return [align(p, find_faces(p)[0].landmarks, TEMPLATE, LARGE) for p in pictures]


def at(x: float, y: float) -> tuple[int, int]:
    return round(x * LARGE), round(y * LARGE)


def shaded(face: np.ndarray, shape: np.ndarray, colour: tuple[int, int, int]) -> np.ndarray:
    """Cover a shape (S, S) of 0 to 255 with a cloth that takes the light of the photo."""
    light = cv2.GaussianBlur(cv2.cvtColor(face, cv2.COLOR_RGB2GRAY).astype(np.float32), (0, 0), 24)
    light = np.clip(light / np.percentile(light, 90), 0.4, 1.1)[..., None]
    share = shape[..., None] / np.float32(255)
    return np.uint8(np.clip(face * (1 - share) + light * np.float32(colour) * share, 0, 255))


def glasses(lens: bool) -> Change:
    def change(face: np.ndarray) -> np.ndarray:
        out = face.copy()
        for x, _ in TEMPLATE[:2]:
            size = round(0.13 * LARGE), round(0.1 * LARGE)
            thick = cv2.FILLED if lens else round(0.015 * LARGE)
            cv2.ellipse(out, at(x, 0.44), size, 0, 0, 360, (25, 22, 24), thick, cv2.LINE_AA)
        cv2.line(out, at(0.44, 0.41), at(0.56, 0.41), (25, 22, 24), round(0.02 * LARGE))
        return out

    return change


def mask(colour: tuple[int, int, int]) -> Change:
    edge = (0.16, 0.6), (0.36, 0.57), (0.5, 0.54), (0.64, 0.57), (0.84, 0.6), (0.78, 0.9)
    edge += (0.6, 1.02), (0.4, 1.02), (0.22, 0.9)

    def change(face: np.ndarray) -> np.ndarray:
        shape = np.zeros(face.shape[:2], np.uint8)
        cv2.fillPoly(shape, [np.array([at(*point) for point in edge])], 255, cv2.LINE_AA)
        return shaded(face, shape, colour)

    return change


def beard(face: np.ndarray) -> np.ndarray:
    """Darken cheeks, chin and the skin above the mouth; nose and lips stay free."""
    shape = np.zeros(face.shape[:2], np.uint8)
    cv2.ellipse(
        shape, at(0.5, 0.84), (round(0.24 * LARGE), round(0.16 * LARGE)), 0, 0, 360, 230, -1
    )
    cv2.ellipse(shape, at(0.5, 0.775), (round(0.1 * LARGE), round(0.04 * LARGE)), 0, 0, 360, 0, -1)
    return shaded(face, cv2.GaussianBlur(shape, (0, 0), 5), (60, 48, 40))


def toned(colour: tuple[float, float, float]) -> Change:
    def change(face: np.ndarray) -> np.ndarray:
        grey = cv2.cvtColor(face, cv2.COLOR_RGB2GRAY)[..., None]
        return np.uint8(np.clip(grey * np.array(colour), 0, 255))

    return change


def faded(face: np.ndarray) -> np.ndarray:
    return np.uint8(0.5 * face + 0.5 * toned((1, 1, 1))(face))


def poster(face: np.ndarray) -> np.ndarray:
    """Paint a face in three flat colours and draw its outlines, as a comic does."""
    smooth = cv2.medianBlur(face, 9)
    grey = cv2.equalizeHist(cv2.cvtColor(smooth, cv2.COLOR_RGB2GRAY))
    colours = np.array([(30, 15, 60), (225, 60, 90), (255, 235, 215)], np.uint8)
    flat = colours[np.digitize(grey, (85, 150))]
    mean, under = cv2.ADAPTIVE_THRESH_MEAN_C, cv2.THRESH_BINARY
    flat[cv2.adaptiveThreshold(grey, 255, mean, under, 31, 8) == 0] = 10
    return flat


def sharpened(face: np.ndarray) -> np.ndarray:
    return cv2.addWeighted(face, 1.8, cv2.GaussianBlur(face, (0, 0), 6), -0.8, 0)


def dark(face: np.ndarray) -> np.ndarray:
    return np.uint8(face * 0.3)


def told(face: np.ndarray, change: Change) -> str:
    small = cv2.resize(change(face), (SIDE, SIDE), interpolation=cv2.INTER_AREA)
    return "; ".join(doubts_about(small))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (glasses(lens=True), EYES),
        (mask((120, 170, 210)), MOUTH),
        (mask((230, 232, 235)), MOUTH),
        (mask((35, 35, 38)), MOUTH),
        (toned((1, 1, 1)), TONE),
        (toned((1.1, 0.95, 0.75)), TONE),
        (poster, DRAWN),
    ],
    ids=["sunglasses", "blue mask", "white mask", "black mask", "grey", "sepia", "poster"],
)
def test_what_hides_a_face_is_told(faces: list[np.ndarray], change: Change, says: str) -> None:
    assert sum(says in told(face, change) for face in faces) >= 5
    assert says in told(faces[0], change)


@pytest.mark.parametrize(
    "change",
    [np.copy, glasses(lens=False), beard, faded, sharpened, dark, np.fliplr],
    ids=["as it is", "clear glasses", "beard", "faded", "sharpened", "dark", "mirrored"],
)
def test_what_only_looks_like_it_is_not_told(faces: list[np.ndarray], change: Change) -> None:
    assert [told(face, change) for face in faces] == [""] * len(faces)


def test_a_photo_warns_of_it_once(astronaut: Path, tmp_path: Path) -> None:
    photo = read_photo(astronaut)
    grey = tmp_path / "grey.png"
    Image.fromarray(photo).convert("L").save(grey)
    (warning,) = crop_face(grey, TEMPLATE, 64).warnings
    assert TONE in warning and "try a photo in colour" in warning
    assert crop_face(astronaut, TEMPLATE, 64).warnings == ()
    night = tmp_path / "night.png"  # its colours are lost, which is not another fault
    Image.fromarray(np.uint8(photo * 0.05)).save(night)
    (warning,) = crop_face(night, TEMPLATE, 64).warnings
    assert "very dark" in warning
