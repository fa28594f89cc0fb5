"""A folder's networks are read by hdb itself: as diffusers and transformers read them, or with a
line that says what is missing."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from registry.errors import HdbError
from registry.stable_diffusion.loading import load_folder

if TYPE_CHECKING:
    from cutdown import Narrow

TEXTS = {"sd1": ("text_encoder",), "sd2": ("text_encoder",)}
TEXTS |= {"sdxl": ("text_encoder", "text_encoder_2")}


def everything(module: Any) -> dict[str, torch.Tensor]:
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


@pytest.mark.parametrize("family", TEXTS)
def test_networks_are_what_their_own_libraries_read(family: str, narrow: Narrow) -> None:
    import diffusers
    import transformers

    folder = narrow.folder(family)
    mine: Any = load_folder(folder, "cpu", "float16", family == "sdxl").pipeline
    for part in ("unet", *TEXTS[family]):
        network = getattr(mine, part)
        library: Any = diffusers if part == "unet" else transformers
        kind = getattr(library, type(network).__name__)
        theirs = kind.from_pretrained(folder / part, torch_dtype=torch.float16)
        expected, found = everything(theirs), everything(network)
        assert expected.keys() == found.keys() and len(found) > 30
        for name, value in expected.items():
            assert value.dtype == found[name].dtype and torch.equal(value, found[name]), name
        if part != "unet":
            assert network.config._attn_implementation == theirs.config._attn_implementation
            changed = {"_name_or_path", "dtype"}  # where it lies, and what it is stored as
            same, own = theirs.config.to_dict(), network.config.to_dict()
            assert {k for k in same if same[k] != own.get(k)} <= changed


@pytest.mark.parametrize("older", [True, False])
def test_text_encoders_are_read_by_the_names_of_every_release(
    older: bool, narrow: Narrow, tmp_path: Path
) -> None:
    folder = shutil.copytree(narrow.folder("sd1"), tmp_path / "sd1")
    file = folder / "text_encoder" / "model.safetensors"
    before = load_file(file)
    bare = {key.removeprefix("text_model."): value for key, value in before.items()}
    save_file({f"text_model.{k}" if older else k: v for k, v in bare.items()}, file)
    network = load_folder(folder, "cpu", "float16").components["text_encoder"]
    found = {key.removeprefix("text_model."): v for key, v in network.named_parameters()}
    assert found.keys() == bare.keys()
    assert all(torch.equal(found[key], value) for key, value in bare.items())


@pytest.mark.parametrize("part", ["text_encoder", "text_encoder_2"])
def test_a_text_encoder_without_some_tensors_is_refused(
    part: str, narrow: Narrow, tmp_path: Path
) -> None:
    folder = shutil.copytree(narrow.folder("sdxl"), tmp_path / "sdxl")
    file = folder / part / "model.safetensors"
    tensors = load_file(file)
    gone = next(key for key in tensors if key.endswith("layers.1.mlp.fc1.weight"))
    del tensors[gone]
    save_file(tensors, file)
    with pytest.raises(HdbError, match=rf"lacks 1 tensors of {part}, such as .*mlp\.fc1\.weight"):
        load_folder(folder, "cpu", "float16", True)
