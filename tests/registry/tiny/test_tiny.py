"""The embedded base: loads with stock diffusers, stays small, and its recipe does what it says."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from hdbcli.model.base import Base
from registry.checkpoints.safetensors import read_header, save_tensors
from registry.errors import HdbError
from registry.tiny import WEIGHTS
from registry.tiny.recipe.pictures import read_pictures, sheet
from registry.tiny.recipe.publish import check_finite, publish
from registry.tiny.recipe.styles import CAPTIONS
from registry.tiny.recipe.vocabulary import write_tokenizer

PROJECT_PAGE = (
    "An Instagram selfie of a [V] face",
    "A Pixar character of a [V] face",
    "A [V] face with bark skin",
    "A [V] face as a rock star",
    "A professional shot of a [V] face",
)


def test_loads_as_a_stock_pipeline_and_draws() -> None:
    from diffusers import StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(WEIGHTS, safety_checker=None)
    pipeline.set_progress_bar_config(disable=True)

    def draw(prompt: str) -> np.ndarray:
        generator = torch.Generator().manual_seed(0)
        return pipeline(prompt, 128, 128, 8, generator=generator, output_type="np").images[0]

    face, marble = draw("A face"), draw("A marble bust of a face")
    assert face.shape == (128, 128, 3) and face.std() > 0.05

    def colour(picture: np.ndarray) -> float:
        return float((picture.max(2) - picture.min(2)).mean())

    assert colour(marble) < colour(face) / 2  # the caption matters: marble is grey


def test_weights_are_small_and_half_precision() -> None:
    files = list(WEIGHTS.rglob("*.safetensors"))
    assert len(files) == 5
    assets = Path(__file__).parents[3] / "hdbcli/faces/assets"
    everything = [f for folder in (WEIGHTS, assets) for f in folder.rglob("*") if f.is_file()]
    assert sum(f.stat().st_size for f in everything) <= 60_000_000
    for file in files:
        assert {t.dtype for t in load_file(file).values()} == {torch.float16}
    names = load_file(WEIGHTS / "text_encoder/model.safetensors")
    assert all(name.startswith("text_model.") for name in names)
    check_finite(WEIGHTS)


def test_captions_hold_the_project_pages_prompts() -> None:
    assert set(PROJECT_PAGE) <= set(CAPTIONS.values())
    assert all("[V] face" in caption for caption in CAPTIONS.values())


def test_every_caption_is_whole_words_for_the_tokenizer(tiny: Base) -> None:
    tokenizer = tiny.backbone.pipeline.tokenizer
    for caption in CAPTIONS.values():
        words = tiny.prompt(caption).split()
        assert len(tokenizer(tiny.prompt(caption)).input_ids) == len(words) + 2
    assert len(tokenizer("zebra").input_ids) > 3  # an unknown word falls to letters, not to nothing


def test_autoencoder_brings_portraits_back(tiny: Base) -> None:
    from hdbcli.faces.photo import crop_face

    photo = Path(__file__).parents[2] / "data/heldout/900000/photo-0.jpg"
    crop = crop_face(photo, np.array(tiny.spec.template), tiny.spec.resolution).image
    back = tiny.backbone.decode_latents(tiny.backbone.encode_images(tiny.images([crop])))[0]
    error = ((back.astype(float) - crop) ** 2).mean()
    assert 10 * np.log10(255**2 / error) > 20 > 10 * np.log10(255**2 / crop.astype(float).var())


def test_tokenizer_round_trip(tmp_path: Path) -> None:
    from transformers import CLIPTokenizer

    tokenizer = write_tokenizer(
        tmp_path / "v", ["a", "face", "with", "bark", "skin", "sks", "character"]
    )
    ids = tokenizer("a sks face with bark skin").input_ids
    assert len(ids) == 8
    tokenizer.save_pretrained(tmp_path / "t")
    assert (
        CLIPTokenizer.from_pretrained(tmp_path / "t")("a sks face with bark skin").input_ids == ids
    )


def test_pictures_are_read_in_order(tmp_path: Path) -> None:
    pixels = torch.arange(2 * 3 * 64 * 64).remainder(251).to(torch.uint8).view(2, 3, 64, 64)
    for seed in (7, 3):
        folder = tmp_path / f"{seed:06d}"
        sheet([pixels[:1]], folder / "portrait-0.png")
        sheet([pixels[1:]], folder / "bark-0.png")
    read = read_pictures(tmp_path)
    assert read.people.tolist() == [3, 3, 7, 7] and read.styles.tolist() == [3, 0, 3, 0]
    assert torch.equal(read.pixels[1], pixels[0])
    with pytest.raises(HdbError, match="render step"):
        read_pictures(tmp_path / "none")


def test_publish_refuses_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(HdbError, match="base step"):
        publish(tmp_path, tmp_path / "weights")
    assert not (tmp_path / "weights").exists()


def test_publish_meets_what_ships_halfway(tmp_path: Path) -> None:
    """Or replaces it; what was not trained anew stays, and no path of a work folder is written."""
    build, weights = tmp_path / "build", tmp_path / "weights"

    def write(folder: Path, number: float, shape: int = 2) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {"w": torch.full((shape,), number)}
        save_tensors(tensors, folder / "model.safetensors", {"format": "pt"})

    def read() -> list[float]:
        files = (weights / f"{name}/model.safetensors" for name in ("unet", "vae"))
        return [load_file(file)["w"].mean().item() for file in files]

    for part, mine, theirs in (("pipeline/unet", 1.0, 3.0), ("vae", 4.0, 0.0)):
        write(build / part, mine)
        write(weights / Path(part).name, theirs)
    (build / "pipeline/model_index.json").write_text('{"_name_or_path": "/somewhere", "a": 1}')
    save_tensors({"w": torch.ones(1)}, weights / "clip.safetensors", {"format": "pt", "kind": "c"})
    publish(build, weights, halfway=True)
    assert read() == [2.0, 2.0]
    assert json.loads((weights / "model_index.json").read_text()) == {"a": 1}
    assert read_header(weights / "clip.safetensors", 10_000).metadata["kind"] == "c"
    publish(build, weights)
    assert read() == [1.0, 4.0]
    write(build / "pipeline/unet", 1.0, shape=3)
    with pytest.raises(HdbError, match="another network"):
        publish(build, weights, halfway=True)
    assert read() == [1.0, 4.0]
