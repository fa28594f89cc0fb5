"""The painters of photographs: a seed is a picture, every style does what it says, faces stay."""

from __future__ import annotations

import os
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from chips import chip

from hdbcli.faces.dlib import load_dlib
from hdbcli.faces.photo import find_faces, read_photo
from hdbcli.training.people import read_people
from registry.errors import HdbError
from registry.plugins import load_registry
from registry.tiny import TEMPLATE
from registry.tiny.recipe.assets import FACE_MESH, SELFIE, read_image
from registry.tiny.recipe.paint import Painted, paint, pushed
from registry.tiny.recipe.photographs import (
    KINDS,
    NOBODY,
    paint_photographs,
    read_photographs,
    sources,
    write_people,
)
from registry.tiny.recipe.pictures import STYLES, read_pictures
from registry.tiny.recipe.styles import CAPTIONS
from registry.tiny.recipe.subject import (
    CANVAS,
    CHIN,
    FOREHEAD,
    LEFT_CHEEK,
    PARTS,
    RIGHT_CHEEK,
    SIDE,
    Reader,
    Subject,
    camera,
    guided,
    moved,
    wide_crop,
    wide_template,
)

ASSETS = Path(__file__).parents[3] / "build/tiny/assets"
HELD_OUT = Path(__file__).parents[2] / "data/heldout/900000/photo-0.jpg"


@pytest.fixture(scope="session")
def reader() -> Reader:
    """Use the networks of an earlier run of the recipe, or fetch them once (HDB_FETCH_ASSETS=1)."""
    here = all(package.place(ASSETS).is_dir() for package in (SELFIE, FACE_MESH))
    if not here and not os.environ.get("HDB_FETCH_ASSETS"):
        pytest.skip("MediaPipe's networks (11 MB) are not here; HDB_FETCH_ASSETS=1 fetches them")
    return Reader(ASSETS)


@pytest.fixture(scope="session")
def subject(reader: Reader, astronaut: Path) -> Subject:
    return _read(reader, astronaut)


@pytest.fixture(scope="session")
def painted(subject: Subject) -> dict[str, Painted]:
    return {style: paint(subject, style, np.random.default_rng(1)) for style in CAPTIONS}


def _read(reader: Reader, photo: Path) -> Subject:
    rgb = read_photo(photo)
    found = reader.read(wide_crop(rgb, find_faces(rgb)[0].landmarks))
    assert found is not None
    return found


def test_the_camera_puts_the_template_where_it_belongs() -> None:
    there = moved(wide_template() * SIDE, camera())
    assert np.allclose(there, np.array(TEMPLATE) * CANVAS)
    back = moved(wide_template() * SIDE, camera(zoom=0.5, roll=0.2, shift=(0.1, 0)))
    eyes, before = back[1] - back[0], there[1] - there[0]
    assert np.isclose(np.linalg.norm(eyes), 0.5 * np.linalg.norm(before))
    assert np.isclose(np.arctan2(eyes[1], eyes[0]), 0.2)


def test_points_go_through_the_lens_as_pixels_do() -> None:
    centre, strength, reach = np.array([80.0, 90.0]), 0.26, 100.0
    points = np.random.default_rng(0).uniform(0, 160, (50, 2))
    there = pushed(points, centre, strength, reach)
    # The picture at a place shows what the lens pulls it from: that has to be the point.
    away = there - centre
    pull = 1 - strength * np.clip(1 - (away**2).sum(axis=1, keepdims=True) / reach**2, 0, 1)
    assert np.abs(centre + away * pull - points).max() < 0.05
    assert np.abs(there - points).max() > 5


def test_the_guided_filter_smooths_noise_and_keeps_edges() -> None:
    rng = np.random.default_rng(0)
    step = np.repeat(np.array([[0.2, 0.8]], np.float32), 32, axis=1).repeat(64, axis=0)
    noisy = (step + rng.normal(0, 0.03, step.shape)).astype(np.float32)
    smooth = guided(noisy, noisy, 4, 0.01)
    assert smooth[:, :20].std() < 0.4 * noisy[:, :20].std()
    jump = smooth[:, 33].mean() - smooth[:, 30].mean()
    blurred = cv2.blur(noisy, (9, 9))
    assert jump > 0.5 > 0.3 > blurred[:, 33].mean() - blurred[:, 30].mean()
    three = guided(noisy, np.dstack([noisy, noisy, step]), 4, 0.01)
    assert np.allclose(three[:, :, 0], smooth, atol=1e-5)


def test_reads_what_is_where(subject: Subject) -> None:
    for name, index in (("right_eye", 0), ("left_eye", 1)):
        away = subject.mesh[PARTS[name]].mean(axis=0) - subject.points[index]
        assert np.linalg.norm(away) < 0.03 * SIDE

    def at(layer: np.ndarray, point: np.ndarray) -> float:
        x, y = np.round(point).astype(int)
        return float(layer[y - 3 : y + 4, x - 3 : x + 4].mean())

    nose, crown = subject.points[2], subject.mesh[FOREHEAD] - [0, 0.09 * SIDE]
    chest = np.array([subject.mesh[CHIN, 0], SIDE - 8])
    for layer, point in (
        (subject.skin, nose),
        (subject.hair, crown),
        (subject.clothes, chest),
    ):
        assert at(layer, point) > 0.7
        assert at(subject.person, point) > 0.9
    assert at(subject.person, np.array([12, 60])) < 0.1
    assert np.abs(subject.skin + subject.hair + subject.clothes - subject.person).max() < 0.02
    assert np.allclose(np.linalg.norm(subject.normals, axis=2), 1, atol=1e-3)
    inward = 0.15 * (subject.mesh[LEFT_CHEEK] - subject.mesh[RIGHT_CHEEK])
    across = subject.normals[:, :, 0]
    assert at(across, subject.mesh[RIGHT_CHEEK] + inward) < -0.2
    assert at(across, subject.mesh[LEFT_CHEEK] - inward) > 0.2


def test_no_face_is_read_as_none(reader: Reader) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (SIDE, SIDE, 3)).astype(np.uint8)
    assert reader.read(cv2.GaussianBlur(noise, (0, 0), 5)) is None


@pytest.mark.parametrize("style", CAPTIONS)
def test_a_seed_is_a_picture(subject: Subject, painted: dict[str, Painted], style: str) -> None:
    again = paint(subject, style, np.random.default_rng(1))
    assert (again.pixels == painted[style].pixels).all()
    assert again.pixels.shape == (128, 128, 3) and again.pixels.dtype == np.uint8
    other = paint(subject, style, np.random.default_rng(2)).pixels
    assert (other != again.pixels).any() == (style != "portrait")


def test_faces_stay_faces_of_the_same_person(reader: Reader, painted: dict[str, Painted]) -> None:
    stranger = paint(_read(reader, HELD_OUT), "portrait", np.random.default_rng(0))
    pictures = [*painted.values(), stranger]
    chips = np.stack([chip(picture.pixels, picture.points) for picture in pictures])
    with torch.no_grad():
        faces = load_dlib()(torch.from_numpy(chips).permute(0, 3, 1, 2).float())
    own = (faces[1:-1] - faces[0]).norm(dim=1)
    other = (faces[:-1] - faces[-1]).norm(dim=1)
    assert own.max() < 0.65 and own.median() < 0.5
    assert other[1:].min() > own.max()
    for style, picture in painted.items():
        found = find_faces(picture.pixels)
        assert found, style
        assert np.abs(found[0].landmarks - picture.points).mean() < 5, style


def test_every_style_does_what_it_says(painted: dict[str, Painted]) -> None:
    def spread(rgb: np.ndarray) -> float:
        return float((rgb.max(axis=-1) - rgb.min(axis=-1)).mean())

    def grey(rgb: np.ndarray) -> np.ndarray:
        return rgb.mean(axis=-1)

    def eyes(points: np.ndarray) -> np.ndarray:
        return points[1] - points[0]

    rgb = {style: picture.pixels.astype(float) for style, picture in painted.items()}
    points = {style: picture.points for style, picture in painted.items()}
    plain = rgb["portrait"]
    level = np.linalg.norm(eyes(points["portrait"]))
    for style in ("pixar", "bark", "rockstar", "popart", "marble", "bronze"):
        assert np.allclose(points[style], np.array(TEMPLATE) * 128, atol=0.1)
    assert 0.57 < np.linalg.norm(eyes(points["professional"])) / level < 0.67
    across, down = eyes(points["selfie"])
    assert 6 < abs(np.degrees(np.arctan2(down, across))) < 15
    face = slice(40, 100), slice(35, 93)
    # Faded: nothing is black any more.
    assert np.quantile(grey(rgb["selfie"]), 0.01) > 15 > 8 > np.quantile(grey(plain), 0.01)
    assert spread(rgb["marble"][face]) < 15 < 40 < spread(plain[face])
    assert rgb["bronze"][face][..., 0].mean() > 1.7 * rgb["bronze"][face][..., 2].mean()
    assert spread(rgb["pixar"]) > 1.2 * spread(plain)
    left, right = rgb["rockstar"][60:90, 30:50], rgb["rockstar"][60:90, 78:98]
    tint = [part.mean(axis=(0, 1)) / part.mean() for part in (left, right)]
    assert np.abs(tint[0] - tint[1]).max() > 0.25
    wood = rgb["bark"]
    assert wood[:20, :15, 1].mean() > wood[:20, :15, 0].mean()  # a wood behind
    # Inks are flat: neighbours on the face are the same more than twice as often.
    same = [
        (np.abs(np.diff(picture[face], axis=1)).max(axis=-1) <= 2).mean()
        for picture in (rgb["popart"], plain)
    ]
    assert same[0] > 0.38 and same[0] > 2 * same[1]


def test_an_unknown_style_is_refused(subject: Subject) -> None:
    with pytest.raises(HdbError, match=r"watercolour.*portrait"):
        paint(subject, "watercolour", np.random.default_rng(0))


def test_photographs_become_shards(reader: Reader, astronaut: Path, tmp_path: Path) -> None:
    picture = read_image(astronaut, cv2.IMREAD_COLOR)
    data, build = tmp_path / "data", tmp_path / "build"
    for name in ("people/0000/0", "people/0123/1", "nobodies/SDXL_1", "nobodies/SDXL_2"):
        (data / name).parent.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(data / f"{name}.jpg"), picture)
    build.mkdir()
    (build / "assets").symlink_to(ASSETS)
    held = {(s.person, s.photo): s.held for s in sources(data)}
    assert held == {(0, 0): True, (123, 1): False, (NOBODY, 0): True, (NOBODY + 1, 0): False}
    steps = list(paint_photographs(data, build))
    assert [step[:2] for step in steps] == [(i, 4) for i in (1, 2, 3, 4)]
    found = read_photographs(build)
    assert found.pixels.shape == (2 * len(STYLES), 3, 128, 128)
    assert set(found.people.tolist()) == {123, NOBODY + 1}
    assert set(read_photographs(build, held=True).people.tolist()) == {0, NOBODY}
    kinds = dict(zip(found.people.tolist(), found.kinds.tolist(), strict=True))
    assert kinds == {123: KINDS.index("person"), NOBODY + 1: KINDS.index("nobody")}
    own = found.people == 123
    assert (found.photos[own] == 1).all() and found.styles[own].tolist() == list(range(9))
    portraits = found.pixels[found.styles == 0]
    assert (portraits[0] == portraits[1]).all()  # the same photo
    marble = found.pixels[found.styles == STYLES.index("marble")]
    assert (marble[0] != marble[1]).any()  # but every photo has its own seed
    # What is there is not made again; what is missing is, and comes out the same.
    kept, gone = (build / "photographs" / f"{n}-000.safetensors" for n in ("heldout", "train"))
    written, content = kept.stat().st_mtime_ns, gone.read_bytes()
    gone.unlink()
    assert len(list(paint_photographs(data, build))) == 2
    assert kept.stat().st_mtime_ns == written and gone.read_bytes() == content
    with pytest.raises(HdbError, match="people/NNNN"):
        sources(tmp_path / "nowhere")
    # As a folder of people: for training with hdb's own command, and for the other steps.
    assert list(write_people(build)) == [(1, 1)]
    assert list(write_people(build, held=True)) == [(1, 1)]
    assert {path.name for path in (build / "heldout").iterdir()} == {"500000", "600000"}
    people = read_people(build / "people", load_registry().get("tiny"), "*", True, lambda *_: None)
    assert people.names == ("500123", "600001") and not people.skipped
    assert [len(each) for each in (*people.members, *people.styled)] == [1, 1, 8, 8]
    assert set(people.captions.values()) == set(CAPTIONS.values()) - {CAPTIONS["portrait"]}
    again = read_pictures(build / "people")
    order = np.argsort([int(each) for each in again.styles[:9]])
    assert (again.pixels[:9][order] == found.pixels[own]).all()
