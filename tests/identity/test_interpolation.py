"""The walk between identities: its ends are they, its steps what composing gives, in one pass."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import hdb
from identities import describe
from PIL import Image

from hdbcli.config import CAPTIONS, PORTRAIT
from hdbcli.identity.file import save
from hdbcli.identity.interpolation import COLUMNS, ROWS, SEED, walk, weights_of
from hdbcli.method.algebra import stack
from hdbcli.method.lidb import Theta
from hdbcli.model.base import Base
from hdbcli.model.sample import generate
from registry import store
from registry.errors import HdbError
from registry.spec import BaseSpec, SampleSettings
from registry.stable_diffusion.backbone import StableDiffusion

SIDE, STEPS = 128, 3


def random_theta(base: Base, seed: int, rank: int) -> Theta:
    first = base.first_theta(rank)
    generator = torch.Generator().manual_seed(seed)
    return Theta(first.down, 0.2 * torch.randn(first.up.shape, generator=generator))


@pytest.fixture
def people(tiny: Base, hdb_home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Store three people of different ranks, and work in a folder of the test's own, quickly."""
    monkeypatch.setattr(BaseSpec, "sampling", SampleSettings(steps=STEPS))
    for seed, name in enumerate(("alice", "bob", "carol")):
        theta = random_theta(tiny, seed, 2 + seed)
        save(describe(tiny, theta, ""), store.path_of(name), "fp32")
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Count the pictures of each pass through the model."""
    counted: list[int] = []
    sample = StableDiffusion.sample

    def counting(self: StableDiffusion, prompts: list[str], *rest: object) -> np.ndarray:
        counted.append(len(prompts))
        return sample(self, prompts, *rest)

    monkeypatch.setattr(StableDiffusion, "sample", counting)
    yield counted


def tile(sheet: Path, row: int, column: int) -> np.ndarray:
    whole = np.asarray(Image.open(sheet)).astype(int)
    return whole[row * SIDE : (row + 1) * SIDE, column * SIDE : (column + 1) * SIDE]


def drawn(name: str, prompt: str, out: Path) -> np.ndarray:
    result = hdb("gen", name, prompt, "-n", 1, "--seed", SEED, "--steps", STEPS, "-o", out)
    assert result.exit_code == 0, result.stderr
    return np.asarray(Image.open(out)).astype(int)


def test_the_walk_leads_from_one_to_the_next() -> None:
    two, three = weights_of(2), weights_of(3)
    assert len(two) == COLUMNS and len(three) == 2 * COLUMNS - 1
    assert two[0] == [1, 0] and two[-1] == [0, 1] and two[COLUMNS // 2] == [0.5, 0.5]
    assert three[COLUMNS - 1] == [0, 1, 0] and three[-1] == [0, 0, 1]
    for weights in (*two, *three):
        assert sum(weights) == pytest.approx(1) and min(weights) >= 0
    steps = np.diff(np.array(two)[:, 0])
    np.testing.assert_allclose(steps, steps[0])  # linearly
    with pytest.raises(HdbError, match="two identities"):
        weights_of(1)


def test_every_step_is_the_sum_of_dw_on_every_target(tiny: Base) -> None:
    a, b = random_theta(tiny, 0, 2), random_theta(tiny, 1, 3)
    whole, (left, right) = walk([a, b]), (x.up @ x.down for x in (a, b))
    cores = whole.up @ whole.down  # (steps, L, b, a)
    for core, (wa, wb) in zip(cores, weights_of(2), strict=True):
        assert (core - (wa * left + wb * right)[0]).abs().max() < 1e-5
    assert (cores[0] - cores[1]).abs().max() > 1e-2  # the control


def test_the_sheet_is_drawn_in_one_pass_and_is_true(
    people: None, passes: list[int], tmp_path: Path
) -> None:
    result = hdb("compose", "alice=0.5", "bob=0.5", "--as", "both", "--dtype", "fp32", "--show")
    assert result.exit_code == 0, result.stderr
    sheet = tmp_path / "both-walk.png"
    assert result.stdout.splitlines()[1] == sheet.name
    assert passes == [2 * COLUMNS]
    picture = Image.open(sheet)
    assert picture.size == (COLUMNS * SIDE, len(ROWS) * SIDE)
    assert "alice to bob" in picture.text["parameters"]
    moving = tmp_path / "both-walk.webp"
    assert result.stdout.splitlines()[2] == moving.name
    steps = [np.hstack([tile(sheet, row, c) for row in range(len(ROWS))]) for c in range(COLUMNS)]
    with Image.open(moving) as animated:
        assert (animated.n_frames, animated.size) == (2 * COLUMNS - 2, (len(ROWS) * SIDE, SIDE))
        places = []
        for frame in range(animated.n_frames):
            animated.seek(frame)
            now = np.asarray(animated.convert("RGB")).astype(int)
            places.append([bool((now == step).all()) for step in steps].index(True))
    assert places == [*range(COLUMNS), *range(COLUMNS - 2, 0, -1)]  # there and back
    middle = COLUMNS // 2
    for row, prompt in enumerate(ROWS):
        alone = {}
        for name, column in (("alice", 0), ("both", middle), ("bob", COLUMNS - 1)):
            alone[name] = drawn(name, prompt, tmp_path / "x.png")
            assert abs(tile(sheet, row, column) - alone[name]).max() <= 1, (row, name)
        assert abs(alone["both"] - alone["alice"]).max() > 1  # the controls: people differ
        assert abs(alone["both"] - alone["bob"]).max() > 1
    assert abs(tile(sheet, 0, 0) - tile(sheet, 1, 0)).max() > 1  # and so do the prompts


def test_a_walk_through_three_and_where_its_sheet_goes(people: None, tmp_path: Path) -> None:
    words = ("compose", "alice", "bob", "carol", "--as", "all", "--show", "--json")
    values = json.loads(hdb(*words, "-o", "here.png").stdout)
    assert (
        values["name"] == "all" and Path(values["sheet"]).name == "here.png" and values["rank"] == 9
    )
    assert Path(values["animation"]).name == "here.webp" and Image.open("here.webp").n_frames == 24
    assert values["bytes"] == store.path_of("all").stat().st_size
    assert Image.open("here.png").size[0] == (2 * COLUMNS - 1) * SIDE


def test_what_cannot_be_shown_is_told_and_nothing_is_written(people: None, tmp_path: Path) -> None:
    for words, says in (
        (("alice", "--as", "x", "--show"), "two identities"),
        (("alice", "bob", "--as", "x", "-o", "y.png"), "add --show"),
        (("alice", "bob", "--as", "x", "--show", "-o", store.folder() / "y.png"), "among the ide"),
        (("alice", "bob", "--as", "x", "--show", "--device", "cuda:9"), "not available"),
        (("alice", "bob", "--as", "alice", "--show"), "alice exists already"),
        (("alice", "alise", "--as", "x", "--show"), "did you mean 'alice'"),
    ):
        result = hdb("compose", *words)
        assert result.exit_code in (1, 2) and says in result.stderr, result.output
        assert result.stderr.startswith("error: ") and not result.stdout
    assert store.names() == ["alice", "bob", "carol"] and not list(tmp_path.glob("*.png"))
    assert len(list(store.folder().iterdir())) == 3


def test_every_pass_has_its_own_people_and_prompts(
    tiny: Base, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = stack([random_theta(tiny, seed, 2) for seed in range(3)])
    prompts, settings = (PORTRAIT, CAPTIONS[1], CAPTIONS[2]), SampleSettings(steps=STEPS)

    def drawn() -> np.ndarray:
        pictures = generate(tiny, adapter, prompts, [0] * 3, settings, lambda *_: None)
        return np.stack([picture.image for picture in pictures]).astype(int)

    whole = drawn()
    monkeypatch.setattr("hdbcli.model.sample._at_once", lambda _: 2)
    assert abs(drawn() - whole).max() <= 1 < abs(whole[2] - whole[0]).max()
