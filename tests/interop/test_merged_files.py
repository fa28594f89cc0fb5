"""Which files a merged model has, and what they say: nothing from beside the model, and what its
UNet predicts."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import diffusers
import pytest
import transformers

from hdbcli.interop import merged_files
from hdbcli.interop.merge import Merge
from hdbcli.method.lidb import Theta, first_theta
from hdbcli.model.files import Checkpoint, open_checkpoint
from registry.bases import added
from registry.bases.settings import Added
from registry.checkpoints.contents import read_checkpoint
from registry.checkpoints.safetensors import read_header
from registry.spec import BaseSpec
from registry.stable_diffusion.families import FAMILIES
from registry.stable_diffusion.recognise import prediction_of

if TYPE_CHECKING:
    from cutdown import Narrow


def quiet(*_: object) -> None:
    pass


def spec_of(family: str, files: Path) -> BaseSpec:
    return added.spec_of(Added("narrow", str(files), family, "epsilon", 64, "", {}))


def theta_0(checkpoint: Checkpoint) -> Theta:
    return first_theta(len(checkpoint.places), checkpoint.spec.a, checkpoint.spec.b)


def test_xl_as_a_single_file_says_that_it_predicts_v(narrow: Narrow, tmp_path: Path) -> None:
    folder = shutil.copytree(narrow.folder("sdxl"), tmp_path / "v")
    config = folder / "scheduler" / "scheduler_config.json"
    told = json.loads(config.read_text())
    for changes in ({}, {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}):
        config.write_text(json.dumps({**told, **changes}))
        checkpoint, out = open_checkpoint(spec_of("sdxl", folder)), tmp_path / "v.safetensors"
        merged_files.write_single(Merge(checkpoint, theta_0(checkpoint), None), out, "x", quiet)
        marks = {key for key, info in read_header(out, 2**40).tensors.items() if info.shape == (0,)}
        assert marks == ({"v_pred", "ztsnr"} if changes else set())
        assert prediction_of(read_checkpoint(out), FAMILIES["sdxl"], None) == (
            "v_prediction" if changes else "epsilon"
        )


@pytest.mark.skipif(os.name != "posix", reason="links")
def test_a_link_to_a_checkpoint_stays_a_link(narrow: Narrow, tmp_path: Path) -> None:
    (tmp_path / "large").mkdir()
    real, link = tmp_path / "large" / "m.safetensors", tmp_path / "m.safetensors"
    real.write_bytes(b"old")
    link.symlink_to(real)
    checkpoint = open_checkpoint(spec_of("sd1", narrow.folder("sd1")))
    merged_files.write_single(Merge(checkpoint, theta_0(checkpoint), None), link, "x", quiet)
    assert link.is_symlink() and read_header(real, 2**40).metadata["modelspec.title"] == "x"
    assert [each.name for each in real.parent.iterdir()] == ["m.safetensors"]


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_stock_diffusers_loads_what_was_merged_from_the_hub(
    narrow: Narrow, tmp_path: Path, family: str
) -> None:
    """Indexes list a safety checker, which hdb neither downloads nor copies in part."""
    folder = shutil.copytree(narrow.folder(family), tmp_path / "hub")
    (folder / "feature_extractor").mkdir()
    (folder / "feature_extractor" / "preprocessor_config.json").write_text('{"size": 8}')
    (folder / "safety_checker").mkdir()
    (folder / "safety_checker" / "config.json").write_text("{}")
    (folder / "safety_checker" / "pytorch_model.bin").write_bytes(b"a pickle")
    checkpoint, out = open_checkpoint(spec_of(family, folder)), tmp_path / "merged"
    merged_files.write_folder(Merge(checkpoint, theta_0(checkpoint), None), out, "x", quiet)
    before, after = (json.loads((each / "model_index.json").read_text()) for each in (folder, out))
    lost = {"sd1": {"safety_checker"}, "sdxl": {"image_encoder"}}[family]
    assert after == before | {name: [None, None] for name in lost} and after != before
    kind = getattr(diffusers, before["_class_name"])
    with pytest.raises((OSError, ValueError)):  # what the index of before would have done
        (shutil.copytree(out, tmp_path / "before") / "model_index.json").write_text(
            json.dumps(before)
        )
        kind.from_pretrained(tmp_path / "before", local_files_only=True)
    pipeline = kind.from_pretrained(out, local_files_only=True)
    assert all(getattr(pipeline, name) is None for name in lost)
    assert isinstance(pipeline.feature_extractor, transformers.CLIPImageProcessor)


def test_words_of_an_index_are_no_paths(narrow: Narrow, tmp_path: Path) -> None:
    """A model from elsewhere may name folders beside itself, or anywhere."""
    folder = shutil.copytree(narrow.folder("sd1"), tmp_path / "near" / "model")
    (folder.parent / "secret.txt").write_text("not of the model")
    index = folder / "model_index.json"
    words = {**json.loads(index.read_text()), "..": ["x", "y"], str(tmp_path): ["x", "y"]}
    index.write_text(json.dumps(words))
    checkpoint, out = open_checkpoint(spec_of("sd1", folder)), tmp_path / "far" / "merged"
    out.parent.mkdir()
    merged_files.write_folder(Merge(checkpoint, theta_0(checkpoint), None), out, "x", quiet)
    assert [each.name for each in out.parent.iterdir()] == ["merged"]
    assert {each.name for each in folder.iterdir()} == {each.name for each in out.iterdir()}
