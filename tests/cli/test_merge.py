"""`hdb merge` on the embedded base, end to end."""

from __future__ import annotations

import json
import os
import shutil
from math import ceil
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
from commands import ok, refused
from PIL import Image
from safetensors.torch import load_file

from hdbcli.bench.harness import random_identity
from registry.tiny import SHIFT, WEIGHTS

if TYPE_CHECKING:
    from cutdown import Narrow


def test_merge_gives_the_same_picture_with_stock_diffusers(alice: Path, tmp_path: Path) -> None:
    import torch
    from diffusers import StableDiffusionPipeline

    ok("merge", "alice", "--out", tmp_path / "m")
    refused("merge", "alice", "--out", tmp_path / "m", says="not empty")
    even = [1 - k / 5 for k in range(5)]
    own = [ceil(1000 * SHIFT * t / (1 + (SHIFT - 1) * t) - 1e-6) - 1 for t in even]
    settings = {"timesteps": own, "guidance_scale": 1.0, "output_type": "np"}
    args = ["-n", 1, "--seed", 3, "--steps", 5, "-o", tmp_path / "mine.png"]
    ok("gen", "alice", "a [V] face", *args)
    mine = np.asarray(Image.open(tmp_path / "mine.png")) / 255

    def stock(folder: Path) -> np.ndarray:
        pipeline = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
        generator = torch.Generator().manual_seed(3)
        return pipeline("a sks face", generator=generator, **settings).images[0]

    def psnr(a: np.ndarray, b: np.ndarray) -> float:
        return -10 * np.log10(((a - b) ** 2).mean() + 1e-12)

    assert psnr(stock(tmp_path / "m"), mine) > 40
    ok("merge", "alice", "--out", tmp_path / "m", "--dtype", "fp32", "--force")
    assert psnr(stock(tmp_path / "m"), mine) > 50
    assert psnr(stock(WEIGHTS), mine) < 40
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]


def test_merge_several_and_what_it_refuses(alice: Path, tmp_path: Path) -> None:
    ok("cp", "alice", "twin")
    result = json.loads(
        ok("merge", "alice=0.5", "twin=0.5", "--out", tmp_path / "h", "--json").stdout
    )
    assert result["of"] == "0.5 alice + 0.5 twin" and result["format"] == "diffusers"
    ok("merge", "alice", "--out", tmp_path / "w")
    unet = "unet/diffusion_pytorch_model.safetensors"
    halves, whole = load_file(tmp_path / "h" / unet), load_file(tmp_path / "w" / unet)
    assert all((halves[k].float() - whole[k].float()).abs().max() < 1e-3 for k in whole)
    single = tmp_path / "m.safetensors"
    refused("merge", "alice", "--out", single, says="tiny has no single-file layout")
    refused("merge", "alice", "--out", tmp_path / "x", "--format", "onnx", says="single-file")
    refused("merge", "alice", "--out", tmp_path / "x", "--dtype", "int8", says="bf16")
    for among in (alice.parent / "model", alice.parent / "m.safetensors"):
        refused("merge", "alice", "--out", among, says="lies among the identities")
    words = ("merge", "alice", "--format", "single-file", "--out")
    refused(*words, tmp_path / "m.ckpt", says="is not named .safetensors")
    refused(*words, tmp_path / "h", "--force", says="is not named .safetensors")
    (tmp_path / "dir.safetensors").mkdir()
    refused(*words, tmp_path / "dir.safetensors", "--force", says="is a folder")
    (tmp_path / "old.safetensors").write_bytes(b"old")
    refused(*words, tmp_path / "old.safetensors", says="exists already")
    assert (tmp_path / "old.safetensors").read_bytes() == b"old"
    refused("merge", "alice=much", "--out", tmp_path / "x", says="has no weight")
    assert not single.exists() and not (tmp_path / "x").exists()


def test_a_merged_folder_never_takes_the_place_of_its_base(
    narrow: Narrow, hdb_home: Path, tmp_path: Path
) -> None:
    """A single file may lie where a model's folder lies, as on the hub."""
    own = tmp_path / "own"
    own.mkdir()
    (own / "model_index.json").write_text("{}")
    file = Path(shutil.copy(narrow.single("sd1"), own / "v1-5.safetensors"))
    ok("base", "add", "plain", file)
    random_identity("plain", "alice")
    refused("merge", "alice", "--out", own, "--force", says="overlap")
    ok("merge", "alice", "--out", tmp_path / "folder")
    names = load_file(tmp_path / "folder/text_encoder/model.safetensors")
    assert len(names) > 20 and all(name.startswith("text_model.") for name in names)
    assert sorted(path.name for path in own.iterdir()) == ["model_index.json", "v1-5.safetensors"]


def test_a_folder_that_cannot_be_renamed_away_is_refused_or_kept(
    alice: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here, real, link = tmp_path / "here", tmp_path / "real", tmp_path / "link"
    here.mkdir(), real.mkdir()
    monkeypatch.chdir(here)
    for out in (".", here):
        refused("merge", "alice", "--out", out, says="cannot be replaced as a whole")
    monkeypatch.setattr(os.path, "ismount", lambda path: Path(path) == real)
    refused("merge", "alice", "--out", real, says="cannot be replaced as a whole")
    monkeypatch.undo()
    monkeypatch.setenv("HDB_HOME", str(alice.parent.parent))
    link.symlink_to(real)
    ok("merge", "alice", "--out", link)
    assert link.is_symlink() and (real / "model_index.json").is_file()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hdb-home", "here", "link", "real"]
