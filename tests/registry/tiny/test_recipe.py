"""The renderer: the same seed is the same person, styles differ, held-out people stay out."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from hdbcli.config import PROMPTS
from registry.spec import SampleSettings
from registry.tiny.clip import load_clip
from registry.tiny.recipe.__main__ import main
from registry.tiny.recipe.assets import (
    LEFT_OUT,
    MATERIALS,
    MESHES,
    OPEN_PEOPLE,
    Assets,
    fetch_assets,
    fetch_selfies,
    read_image,
)
from registry.tiny.recipe.people import HELD_OUT_SEED, render_people
from registry.tiny.recipe.person import sample_person
from registry.tiny.recipe.photographs import KINDS
from registry.tiny.recipe.pictures import Pictures, read_pictures
from registry.tiny.recipe.styles import CAPTIONS
from registry.tiny.recipe.teacher import new_teacher

ROOT = Path(__file__).parents[3]
SLIDERS = {"nose/nose-scale-horiz-incr": True, "head/head-oval": False, "head/head-round": False}


def test_a_seed_is_a_person() -> None:
    assert sample_person(5, SLIDERS) == sample_person(5, SLIDERS)
    people = [sample_person(seed, SLIDERS) for seed in range(200)]
    assert len({p.hair for p in people}) > 4 and len({p.eyes for p in people}) > 4
    assert 60 < sum(p.male > 0.5 for p in people) < 140
    assert (
        20 < sum(p.glasses for p in people) < 60 and 8 < sum(p.hat is not None for p in people) < 35
    )
    assert all(abs(sum(p.races.values()) - 1) < 1e-6 for p in people)


@pytest.fixture(scope="session")
def assets(tmp_path_factory: pytest.TempPathFactory) -> Assets:
    """Use the assets of an earlier run of the recipe, or fetch them once (HDB_FETCH_ASSETS=1)."""
    cache = ROOT / "build/tiny/assets"
    here = all((cache / f"{p.name}-{p.version}").is_dir() for p in (MESHES, MATERIALS))
    if not here and not os.environ.get("HDB_FETCH_ASSETS"):
        pytest.skip("the recipe's assets (137 MB) are not here; HDB_FETCH_ASSETS=1 fetches them")
    return fetch_assets(cache)


@pytest.mark.egl
def test_renders_repeatable_people(assets: Assets, tmp_path: Path) -> None:
    folders = [tmp_path / "a", tmp_path / "b"]
    for folder in folders:
        list(render_people(assets, folder, range(HELD_OUT_SEED, HELD_OUT_SEED + 2), 64))
    first, again = (read_pictures(folder) for folder in folders)
    assert len(first.pixels) == 2 * 2 * len(CAPTIONS)
    assert (first.pixels == again.pixels).all()
    one = first.pixels[first.people == HELD_OUT_SEED].float()
    two = first.pixels[first.people == HELD_OUT_SEED + 1].float()
    assert (one - two).abs().mean() > 5
    portraits = first.styles == list(CAPTIONS).index("portrait")
    marble = first.pixels[first.styles == list(CAPTIONS).index("marble")].float()
    spread = marble.amax(1) - marble.amin(1)
    assert (
        spread.mean()
        < 40
        < (first.pixels[portraits].float().amax(1) - first.pixels[portraits].float().amin(1)).mean()
    )


@pytest.mark.egl
def test_rendered_faces_are_found_and_told_apart(assets: Assets, tmp_path: Path) -> None:
    from hdbcli.faces.embedding import embed, found
    from hdbcli.measure.statistics import retrieval

    list(render_people(assets, tmp_path / "p", range(HELD_OUT_SEED, HELD_OUT_SEED + 6), 64))
    pictures = read_pictures(tmp_path / "p")
    portraits = pictures.pixels[pictures.styles == 0].permute(0, 2, 3, 1).numpy()
    faces = embed([np.ascontiguousarray(p) for p in portraits])
    assert found(faces).all()
    assert retrieval(faces[0::2], faces[1::2]).top1 == 1.0
    assert retrieval(faces[0::2], faces[1::2].roll(1, 0)).top1 == 0.0


def step(*arguments: str | Path) -> int:
    return main([str(argument) for argument in arguments])


def store(build: Path, part: str, pictures: Pictures) -> None:
    """Keep pictures as the photographs step does."""
    count = len(pictures.pixels)
    tensors = {
        "pixels": pictures.pixels.permute(0, 2, 3, 1).contiguous(),
        "styles": pictures.styles.to(torch.uint8),
        "people": pictures.people.int(),
        "kinds": torch.full((count,), KINDS.index("render"), dtype=torch.uint8),
        "photos": torch.zeros(count, dtype=torch.int32),
        "points": torch.zeros(count, 5, 2),
    }
    (build / "photographs").mkdir(parents=True, exist_ok=True)
    save_file(tensors, build / f"photographs/{part}-000.safetensors")


@pytest.mark.slow  # trains every network a little; their parts are tested in test_recipe_training
@pytest.mark.egl
def test_every_step_from_renders_to_weights(
    assets: Assets,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from diffusers import StableDiffusionPipeline

    monkeypatch.setattr("registry.tiny.recipe.base.SHOWN", 1)
    monkeypatch.setattr("registry.tiny.recipe.base.SAMPLING", SampleSettings(1, 1.0))
    build, weights = tmp_path / "build", tmp_path / "weights"
    training = ("--build", build, "autoencoder", "--batch", "4", "--teacher", tmp_path)
    assert step(*training, "--steps", "1") == 1
    assert "no photographs" in capsys.readouterr().err
    list(render_people(assets, build / "people", range(4), 128))
    store(build, "train", read_pictures(build / "people"))
    list(render_people(assets, tmp_path / "held", range(HELD_OUT_SEED, HELD_OUT_SEED + 1), 128))
    store(build, "heldout", read_pictures(tmp_path / "held"))
    assert step("--build", build, "base", "--steps", "1", "--batch", "2") == 1
    assert "run the autoencoder step first" in capsys.readouterr().err
    assert step(*training, "--steps", "1") == 1
    assert "taef2_encoder.pth" in capsys.readouterr().err
    torch.manual_seed(0)
    torch.save(new_teacher().state_dict(), tmp_path / "taef2_encoder.pth")
    assert step(*training, "--steps", "2") == 0
    taught = load_file(build / "taught-64.safetensors")["latents"].float()
    assert taught[taught.abs() < 10].std().item() == pytest.approx(1, abs=0.5)  # about normalised
    small = ("--build", build, "base", "--side", "64", "--batch", "2")
    capsys.readouterr()
    assert step(*small, "--steps", "2") == 0
    assert step(*small, "--steps", "3") == 0  # goes on after the second step
    steps = re.findall(r"step (\d)/(\d)", capsys.readouterr().out)
    assert steps == [("2", "2"), ("3", "3")]
    before = load_file(build / "pipeline/unet/diffusion_pytorch_model.safetensors")
    large = ("--from", build / "base-64.safetensors", "--lr", "0", "--steps", "1")
    assert step("--build", build, "base", "--batch", "2", *large) == 0
    after = load_file(build / "pipeline/unet/diffusion_pytorch_model.safetensors")
    assert all(torch.equal(before[name], after[name]) for name in before)  # it starts there
    assert step("--build", build, "clip", "--steps", "2") == 0
    assert step("--build", build, "publish", "--weights", weights) == 0
    assert "pixar" in load_clip(weights / "clip.safetensors").words
    folders = build / "pipeline", weights
    configs = [(folder / "vae/config.json").read_text() for folder in folders]
    assert ["_name_or_path" in config for config in configs] == [True, False]
    pipeline = StableDiffusionPipeline.from_pretrained(weights)
    assert pipeline.unet.config.in_channels == pipeline.vae.config.latent_channels
    assert {p.name for p in (build / "sheets").iterdir()} == {
        "autoencoder.png",
        "base-64.png",
        "base-128.png",
    }


def test_a_sheet_has_a_row_a_photo_and_a_column_a_prompt(tmp_path: Path) -> None:
    drawn, shades = tmp_path / "drawn", {}
    for row, name in enumerate(("ann", "anna")):  # the one's pictures are not the other's
        places = f"{name}.png", f"drawn/0/{name}-a-7.png", f"drawn/1/{name}-b-7.png"
        for column, place in enumerate(places):
            path, shade = tmp_path / place, 40 + 60 * row + 20 * column
            path.parent.mkdir(exist_ok=True, parents=True)
            cv2.imwrite(str(path), np.full((64, 64, 3), shade, np.uint8))
            shades[row, column] = shade
    photos, out = (tmp_path / "ann.png", tmp_path / "anna.png"), tmp_path / "sheet.png"
    assert step("contact", *photos, "--drawn", drawn, "--out", out) == 0
    plain = read_image(out, cv2.IMREAD_COLOR)
    assert plain.shape == (2 * 128, 3 * 128, 3)
    middles = {(row, column): plain[64 + 128 * row, 64 + 128 * column, 0] for row, column in shades}
    assert middles == shades
    titles = "--titles", "photo", "bark"
    assert step("contact", *photos, "--drawn", drawn, *titles, "--out", out) == 0
    titled = read_image(out, cv2.IMREAD_COLOR)
    head = titled[: len(titled) - 256]
    assert (titled[-256:] == plain).all() and len(head) and (head[:, 256:] == 255).all()
    assert (head[:, :128] < 128).any() and (head[:, 128:256] < 128).any()


def test_the_sheet_of_readme_is_what_make_draws() -> None:
    """A row for the astronaut and for each selfie, and a column for the photo and for each of the
    page's prompts, under a title that says it."""
    told = subprocess.run(["make", "-n", "sheet"], cwd=ROOT, capture_output=True, text=True)
    said = told.stdout.replace("\\\n", " ")
    prompts, titles = (
        shlex.split(re.search(pattern, said)[1])  # type: ignore[index]  # or the test fails here
        for pattern in (r"for prompt in (.+?); do", r"--titles (.+?) --out")
    )
    assert tuple(prompts) == PROMPTS
    assert titles[:2] == ["photo", "portrait"]
    for title, prompt in zip(titles[2:], prompts[1:], strict=True):
        assert title.lower() in prompt.lower()
    height, width, _ = read_image(ROOT / "docs/sheet.png", cv2.IMREAD_COLOR).shape
    assert (width, height // 128) == (128 * len(titles), 1 + 6)


def test_selfies_are_of_people_who_do_not_exist(tmp_path: Path) -> None:
    """Of the first so many, without the one who is left out, by name."""
    source = OPEN_PEOPLE.place(tmp_path / "assets")
    for number in range(1, 6):
        file = source / f"P00{number}/assets/amateur_selfie.jpg"
        file.parent.mkdir(parents=True)
        file.write_bytes(b"%d" % number)
    made = fetch_selfies(tmp_path / "assets", tmp_path / "out", 3)
    assert [path.name for path in made] == ["P001.jpg", "P002.jpg", "P004.jpg"]
    assert [path.read_bytes() for path in made] == [b"1", b"2", b"4"]
    assert LEFT_OUT == "P003"
