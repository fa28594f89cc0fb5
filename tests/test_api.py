"""The Python interface: the page's example runs, and a call gives what the command gives."""

from __future__ import annotations

import re
import shutil
import tempfile
from dataclasses import FrozenInstanceError
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from commands import hdb, ok, told
from PIL import Image

from hdbcli import api
from hdbcli.identity.file import load
from hdbcli.model.base import Base
from registry import store
from registry.errors import HdbError, HdbWarning
from registry.spec import BaseSpec, SampleSettings

ROOT = Path(__file__).resolve().parents[1]
HELD_OUT = ROOT / "tests/data/heldout"


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """One iteration, and pictures of two steps, where a call leaves their number open."""
    monkeypatch.setattr(BaseSpec, "sampling", SampleSettings(steps=2))
    monkeypatch.setitem(api.new.__kwdefaults__, "steps", 1)
    monkeypatch.setitem(api.generate.__kwdefaults__, "steps", 2)


def test_the_example_of_the_page_runs(
    hdb_home: Path,
    astronaut: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    quick: None,
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copy(astronaut, "alice.jpg")
    shutil.copy(HELD_OUT / "900000/photo-0.jpg", "bob.jpg")
    Path("photos").mkdir()
    shutil.copy("bob.jpg", "photos/bob.jpg")
    Image.new("RGB", (300, 300)).save("photos/empty.png")
    page = (ROOT / "docs/python.md").read_text(encoding="utf-8")
    names: dict[str, Any] = {}
    blocks = re.findall(r"^```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    assert len(blocks) == 4
    for block in blocks:
        exec(block, names)
    images = names["images"]
    assert [type(image) for image in images] == [Image.Image] * 4
    assert {image.size for image in images} == {(128, 128)}
    assert len({image.tobytes() for image in images}) == 4
    with Image.open("alice.png") as saved:
        assert saved.tobytes() == images[0].tobytes()
        assert "a Pixar character of a [V] face" in saved.info["parameters"]
    assert Image.open("sheet.png").width == 256
    assert Path("sheet.html").read_text(encoding="utf-8").count("<img ") == 4
    both = names["both"].pictures
    assert [picture.seed for picture in both] == [0, 1, 0, 1]
    assert not np.array_equal(both[0].image, both[2].image)  # same seed, another person
    assert names["child"].rank == 8 and names["portrait"].image.shape == (128, 128, 3)
    printed = capsys.readouterr().out.splitlines()
    assert store.names() == ["bob"] and str(store.path_of("bob")) in printed[0]
    assert "empty.png" in printed[1] and "no face" in printed[1]
    assert len(printed) == 2


def test_calls_give_what_commands_give(
    tiny: Base,
    alice: Path,
    astronaut: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    quick: None,
) -> None:
    crops = tmp_path / "there.png", tmp_path / "here.png"
    told("new", astronaut, "bob", "--steps", 1, "--seed", 3, "--crop", crops[0])
    there = load(store.path_of("bob"))
    here = api.new(astronaut, base=tiny, steps=1, seed=3, crop=crops[1])
    assert crops[0].read_bytes() == crops[1].read_bytes()
    saved = api.save(here.identity, "carol")
    mine = load(saved.path)
    assert mine.down.equal(there.down) and mine.up.equal(there.up)
    likeness = pytest.approx(here.identity.facts.likeness)
    assert mine.facts.likeness == there.facts.likeness == likeness
    assert saved.dtype == "fp16" and saved.bytes == saved.path.stat().st_size
    words = "gen", "bob", "a [V] face", "-n", 2, "--seed", 5, "--steps", 2, "-o", tmp_path
    files = [Path(each["path"]) for each in told(*words)["pictures"]]
    drawn = api.generate(here.identity, "a [V] face", count=2, seed=5, steps=2, base=tiny)
    stored = api.generate("carol", "a [V] face", count=2, seed=5, steps=2, base=tiny)
    for file, picture, of_file in zip(files, drawn.pictures, stored.pictures, strict=True):
        with Image.open(file) as image:
            pixels = np.array(image)
        assert np.array_equal(pixels, of_file.image)  # fp16 numbers, as the command's
        near = np.abs(pixels.astype(int) - picture.image.astype(int))
        assert near.mean() < 1
    capsys.readouterr()
    one = api.merge({"bob": 0.5, "carol": 0.5}, tmp_path / "one")
    assert capsys.readouterr() == ("", "")  # calls print nothing
    ok("merge", "bob=0.5", "carol=0.5", "-o", tmp_path / "two")
    files = [path.relative_to(one.path) for path in one.path.rglob("*") if path.is_file()]
    assert Path("unet/diffusion_pytorch_model.safetensors") in files
    for file in files:
        assert (tmp_path / "two" / file).read_bytes() == (one.path / file).read_bytes()
    assert one.identifier == tiny.spec.identifier and one.of == "0.5 bob + 0.5 carol"
    with pytest.raises(FrozenInstanceError):
        one.bytes = 0  # type: ignore[misc]


def test_progress_and_notes_are_told(tiny: Base, alice: Path) -> None:
    steps: list[tuple[str, int, int]] = []
    lines: list[str] = []
    api.generate(
        alice,
        "a face",
        count=1,
        seed=0,
        steps=2,
        tell=lambda *s: steps.append(s),
        note=lines.append,
    )
    assert steps[-1] == ("draw", 2, 2)
    assert lines[0].startswith("hint: the prompt has no [V]") and lines[1].startswith("memory: ")
    lines.clear()
    api.generate(alice, "a [V] face", count=1, seed=0, steps=1, base=tiny, note=lines.append)
    assert lines == []  # a loaded base needs no plan
    with pytest.warns(HdbWarning, match="cut off"):
        api.generate(alice, "word " * 99, count=1, seed=0, steps=1, base=tiny)


def test_what_is_refused_says_what_the_command_says(
    tiny: Base, alice: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (300, 300)).save("empty.png")
    before = alice.read_bytes()
    for call, words in (
        (lambda: api.new("empty.png", base=tiny), ["new", "empty.png", "bob"]),
        (lambda: api.generate("bob", "a [V] face"), ["gen", "bob", "a [V] face"]),
        (
            lambda: api.merge("alice", "x.ckpt", format="zip"),
            ["merge", "alice", "-o", "x", "--format", "zip"],
        ),
        (
            lambda: api.export("alice", alice, force=True),
            ["export", "alice", "-o", alice, "--force"],
        ),
        (lambda: api.compose({"alice": 1.0, "bob": 1.0}), ["compose", "alice", "bob", "--as", "c"]),
        (
            lambda: api.new("empty.png", memory="huge"),
            ["new", "empty.png", "bob", "--memory", "huge"],
        ),
    ):
        with pytest.raises(HdbError) as error:
            call()
        assert f"error: {error.value}" in hdb(*words).stderr.splitlines()
    (tmp_path / "aside").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "aside"))
    with pytest.raises(HdbError, match="was not replaced") as error:
        api.save(load(alice), "alice")
    (kept,) = (tmp_path / "aside").rglob("*.safetensors")
    assert str(kept) in str(error.value) and load(kept).down.equal(load(alice).down)
    with pytest.raises(HdbError, match="give its name"):
        api.generate("alice", "a [V] face", loras=[str(alice)], base=tiny)
    face = "a [V] face"
    for wrong, fact in (
        (lambda: api.generate("alice", face, count=0, base=tiny), "count is 0"),
        (lambda: api.generate("alice", face, strength=float("nan"), base=tiny), "strength is nan"),
        (lambda: api.generate("alice", face, guidance=-1, base=tiny), "guidance is -1"),
        (lambda: api.generate("alice", face, seed=-1, base=tiny), "seed is -1"),
        (lambda: api.new("empty.png", seed=2**64, base=tiny), f"seed is {2**64}"),
        (lambda: api.refine("alice", "empty.png", likeness=-0.5, base=tiny), "likeness is -0.5"),
        (lambda: api.new("empty.png", steps=0, base=tiny), "steps is 0"),
        (lambda: api.new("empty.png", crop="crop.jpg", base=tiny), "crop.jpg is not named .png"),
        (lambda: api.new("empty.png", targets="all", base=tiny), "targets='all'"),
        (lambda: api.new("https://example.org/a.png", base=tiny), "is a URL"),
        (lambda: api.compose([("alice", 1.0), ("alice", 1.0)]), "alice comes twice"),
    ):
        with pytest.raises(HdbError, match=fact):
            wrong()
    for call in (lambda: api.generate([], "a [V] face"), lambda: api.compose({})):
        with pytest.raises(HdbError, match="no identity was given"):
            call()
    assert alice.read_bytes() == before and sorted(p.name for p in tmp_path.iterdir()) == [
        "aside",
        "empty.png",
        "hdb-home",
    ]
