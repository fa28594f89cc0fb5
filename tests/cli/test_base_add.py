"""Adding base models from the command line, on cut-down checkpoints; what is refused, and why."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from commands import found, hdb, refused, told
from safetensors.torch import load_file, save_file

if TYPE_CHECKING:
    from cutdown import Narrow

UNET = "unet/diffusion_pytorch_model.safetensors"
TEXT = "text_encoder/model.safetensors"


@pytest.fixture
def folder(narrow: Narrow, tmp_path: Path) -> Path:
    """Copy a cut-down 1.x, for a test to change."""
    return shutil.copytree(narrow.folder("sd1"), tmp_path / "sd1")


def edit(file: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    """Change the tensors of a safetensors file."""
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


def test_add_a_folder_and_a_single_file_of_the_same_weights(narrow: Narrow, hdb_home: Path) -> None:
    one = told("base", "add", "Mine", narrow.folder("sd1"))
    assert one["name"] == "Mine" and one["family"] == "sd1" and one["resolution"] == 64
    assert [one[k] for k in ("a", "b", "budget", "guidance")] == [100, 50, 120_000, 7.5]
    assert one["hypernetwork"] is False and one["path"] == str(narrow.folder("sd1"))
    two = told("base", "add", "single", narrow.single("sd1"))
    assert two["digest"] == one["digest"]  # one model, whatever its layout
    names = [base["name"] for base in told("base", "list")["bases"]]
    assert names == ["Mine", "single", "tiny"]
    same = set(one) - {"settings", "seconds"}
    assert found("base", "show", "mine") == {name: one[name] for name in same}
    assert (
        "px" in hdb("base", "list").stdout and one["digest"] in hdb("base", "show", "Mine").stdout
    )
    kept = sorted(path.name for path in hdb_home.rglob("*") if path.is_file())
    assert kept == ["mine.json", "single.json"]  # referenced, not copied
    assert all((hdb_home / "bases" / name).stat().st_size < 10_000 for name in kept)
    loud = hdb("base", "add", "third", narrow.folder("sd1"))
    assert "set-hypernetwork" in loud.stderr and "Stable Diffusion 1.x" in loud.stdout


@pytest.mark.parametrize(
    ("family", "digest_of"), [("sd2", "v_prediction"), ("sdxl", "epsilon")], ids=["sd2", "sdxl"]
)
def test_add_the_other_families(
    narrow: Narrow, hdb_home: Path, family: str, digest_of: str
) -> None:
    one = told("base", "add", "folder", narrow.folder(family))
    two = told("base", "add", "single", narrow.single(family))
    assert one["family"] == two["family"] == family and one["digest"] == two["digest"]
    assert one["prediction"] == two["prediction"] == digest_of and one["guidance"] >= 5
    other = told("base", "add", "other", narrow.single(family), "--prediction", "v")
    assert other["prediction"] == "v_prediction" and other["digest"] == one["digest"]
    refused("base", "add", "x", narrow.single(family), "--prediction", "z", says="epsilon or v")


def test_default_verify_and_rm(narrow: Narrow, hdb_home: Path, folder: Path) -> None:
    assert found("base", "default") == {"default": "tiny"}
    told("base", "add", "Mine", folder)
    assert found("base", "default", "mine") == {"default": "Mine"}
    assert [base["name"] for base in told("base", "list")["bases"] if base["default"]] == ["Mine"]
    assert "Mine  *" in hdb("base", "list").stdout
    refused("base", "default", "missing", says="Mine, tiny")
    verified = told("base", "verify", "Mine")
    assert verified["files"] == len([p for p in folder.rglob("*") if p.is_file()])
    assert verified["bytes"] == sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    assert found("base", "rm", "mine") == {"name": "Mine", "path": str(folder)}
    assert {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()} == before
    assert found("base", "default") == {"default": "tiny"}  # the default went with it
    for command in ("rm", "verify"):
        refused("base", command, "Mine", says="unknown base model")
        refused("base", command, "tiny", says="not added")
    told("base", "add", "Mine", folder)
    told("base", "default", "Mine")
    assert found("base", "default", "tiny") == {"default": "tiny"}


def test_names_are_checked_and_taken_once(narrow: Narrow, hdb_home: Path, tmp_path: Path) -> None:
    told("base", "add", "mine", narrow.folder("sd1"))
    refused("base", "add", "MINE", narrow.folder("sd1"), says="already")
    refused("base", "add", "tiny", narrow.folder("sd1"), says="already")
    for name in ("../x", "a/b", "con", "x.safetensors"):
        refused("base", "rm", name, says=name)
        refused("base", "add", name, narrow.folder("sd1"), says=name)
    refused("base", "add", "x", tmp_path / "none", says="no such file or folder")
    refused("base", "add", "x", tmp_path, says="model_index.json")
    refused("base", "add", "x", narrow.folder("sd1"), "--revision", "v1", says="--revision")


def test_files_that_changed_are_refused(
    narrow: Narrow, hdb_home: Path, folder: Path, astronaut: Path
) -> None:
    from hdbcli.model.base import open_base

    told("base", "add", "mine", folder)
    file = folder / UNET
    whole = file.read_bytes()
    os.utime(file, ns=(0, 0))  # touched, not changed
    digest = open_base("mine", "cpu").injected.weights_digest()
    assert told("base", "verify", "mine")["digest"] == digest
    changed = bytearray(whole)
    changed[-1] ^= 1  # of some tensor
    file.write_bytes(changed)
    said = refused("new", astronaut, "--base", "mine", says="changed since it was added")
    assert UNET in said and "hdb base rm mine" in said
    refused("base", "verify", "mine", says=UNET)
    file.unlink()
    refused("base", "verify", "mine", says="No such file")
    file.write_bytes(whole)
    told("base", "verify", "mine")
    open_base("mine", "cpu")


def test_pickles_are_refused_by_content_and_by_name(
    narrow: Narrow, hdb_home: Path, tmp_path: Path, folder: Path
) -> None:
    zipped, pickled = tmp_path / "a.ckpt", tmp_path / "b.safetensors"
    torch.save({"state_dict": {"x": torch.zeros(2)}}, zipped)
    assert zipfile.is_zipfile(zipped)
    pickled.write_bytes(pickle.dumps({"x": 1}))
    renamed = shutil.copy(zipped, tmp_path / "c.SafeTensors")
    named = shutil.copy(narrow.single("sd1"), tmp_path / "d.ckpt")
    for file in (zipped, pickled, renamed, named):
        assert "convert it" in refused("base", "add", "x", file, says="is a pickle")
    upper = shutil.copy(narrow.single("sd1"), tmp_path / "d.SAFETENSORS")
    refused("base", "add", "x", upper, says="rename it")
    (folder / UNET).rename(folder / UNET.replace(".safetensors", ".bin"))
    refused("base", "add", "x", folder, says="is a pickle")
    told("base", "add", "x", narrow.single("sd1"))  # the control


def test_half_a_download(narrow: Narrow, hdb_home: Path, tmp_path: Path, folder: Path) -> None:
    add = ("base", "add", "x")
    whole = (folder / UNET).read_bytes()
    (folder / UNET).write_bytes(whole[: len(whole) // 2])
    refused(*add, folder, says="truncated")
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(narrow.single("sd1").read_bytes()[:-1000])
    refused(*add, cut, says="truncated")
    (folder / UNET).write_bytes(whole)

    tensors = load_file(folder / UNET)
    names = sorted(tensors)
    shards = {f"unet-{k}.safetensors": names[k::2] for k in range(2)}
    for shard, keys in shards.items():
        save_file({key: tensors[key] for key in keys}, folder / "unet" / shard)
    index = {"metadata": {}, "weight_map": {k: s for s, keys in shards.items() for k in keys}}
    (folder / f"{UNET}.index.json").write_text(json.dumps(index))
    (folder / UNET).unlink()
    sharded = told(*add, folder)
    assert sharded["digest"] == told("base", "add", "y", narrow.folder("sd1"))["digest"]
    told("base", "rm", "x")
    (folder / "unet" / "unet-1.safetensors").unlink()
    refused(*add, folder, says="1 of 2 shards, such as 'unet-1.safetensors'")
    index["weight_map"] = {"a": "../../secret.safetensors"}
    (folder / f"{UNET}.index.json").write_text(json.dumps(index))
    refused(*add, folder, says="names no shards")


def test_a_folder_of_the_fp16_variant(
    narrow: Narrow, hdb_home: Path, folder: Path, tmp_path: Path
) -> None:
    from hdbcli.bench.harness import random_identity
    from registry.plugins import load_registry
    from registry.stable_diffusion.backbone import StableDiffusion

    plain = told("base", "add", "plain", narrow.folder("sd1"))
    for file in list(folder.rglob("*.safetensors")):
        file.rename(file.with_suffix(".fp16.safetensors"))
    assert told("base", "add", "x", folder)["digest"] == plain["digest"]
    out = tmp_path / "merged"
    random_identity("x", "someone")
    assert told("merge", "someone", "--out", out)["bytes"] > 0
    assert {f.relative_to(out) for f in out.rglob("*.safetensors")} == {
        f.relative_to(folder) for f in folder.rglob("*.safetensors")
    }
    assert told("base", "add", "y", out)["digest"] != plain["digest"]
    vae = folder / "vae/diffusion_pytorch_model.fp16.safetensors"
    vae.rename(folder / "vae/diffusion_pytorch_model.safetensors")  # the variant in part
    mixed = told("base", "add", "mixed", folder)
    assert mixed["digest"] == plain["digest"]
    backbone = load_registry().get("mixed").load("cpu", "float32")
    assert isinstance(backbone, StableDiffusion)
    backbone.free_autoencoder()
    assert backbone.autoencoder is not None  # read again


def test_components_that_are_missing(narrow: Narrow, hdb_home: Path, folder: Path) -> None:
    add = ("base", "add", "x", folder)
    (folder / TEXT).rename(folder / "aside")
    refused(*add, says="no model.safetensors")
    shutil.move(folder / "text_encoder", folder / "other")
    refused(*add, says="lacks text_encoder, which Stable Diffusion 1.x needs")
    shutil.move(folder / "other", folder / "text_encoder")
    (folder / "aside").rename(folder / TEXT)
    told(*add)
    told("base", "rm", "x")
    edit(
        folder / UNET,
        lambda t: t.pop("mid_block.attentions.0.transformer_blocks.0.attn1.to_q.weight"),
    )
    refused(*add, says="143 of 144")


def test_a_tensor_that_no_target_needs_is_missed_too(
    narrow: Narrow, hdb_home: Path, tmp_path: Path, folder: Path
) -> None:
    single = Path(shutil.copy(narrow.single("sd1"), tmp_path / "one.safetensors"))
    told("base", "add", "whole", single)
    edit(single, lambda t: t.pop("first_stage_model.decoder.mid.block_1.conv1.weight"))
    gone = "decoder.mid_block.resnets.0.conv1.weight"
    refused("base", "add", "x", single, says=f"lacks 1 tensors of vae, such as {gone}")
    edit(folder / UNET, lambda t: t.pop("mid_block.resnets.0.conv1.weight"))
    refused("base", "add", "x", folder, says="mid_block.resnets.0.conv1.weight")


def test_another_architecture(narrow: Narrow, hdb_home: Path, tmp_path: Path, folder: Path) -> None:
    flux, lora = tmp_path / "flux.safetensors", tmp_path / "lora.safetensors"
    save_file({"model.diffusion_model.double_blocks.0.img_attn.x": torch.zeros(1)}, flux)
    save_file({"lora_unet_mid_block.lora_up.weight": torch.zeros(1)}, lora)
    for file, what in ((flux, "Flux"), (lora, "a LoRA")):
        said = refused("base", "add", "x", file, says=f"but {what}")
        assert "the nearest is Stable Diffusion 1.x" in said

    def shallow(tensors: dict[str, torch.Tensor]) -> None:
        for name in [n for n in tensors if n.startswith("mid_block.attentions")]:
            del tensors[name]

    edit(folder / UNET, shallow)  # as distilled models are
    said = refused("base", "add", "x", folder, says="15 transformer blocks")
    assert "'StableDiffusionPipeline'" in said and "16 transformer blocks" in said
    told("base", "add", "x", narrow.folder("sd1"))


def test_unets_that_read_something_else(narrow: Narrow, hdb_home: Path, folder: Path) -> None:
    def widen(tensors: dict[str, torch.Tensor]) -> None:
        tensors["conv_in.weight"] = torch.zeros(128, 9, 3, 3, dtype=torch.float16)

    whole = (folder / UNET).read_bytes()
    edit(folder / UNET, widen)
    refused("base", "add", "x", folder, says="9 input channels, as of an inpainting model")
    (folder / UNET).write_bytes(whole)
    single = Path(shutil.copy(narrow.single("sd1"), folder.parent / "inpainting.safetensors"))
    first = "model.diffusion_model.input_blocks.0.0.weight"
    edit(single, lambda t: t.update({first: t[first].repeat(1, 3, 1, 1)[:, :9].contiguous()}))
    refused("base", "add", "x", single, says="9 input channels, as of an inpainting model")
    tokens = next(name for name in load_file(folder / TEXT) if "token_embedding" in name)
    edit(folder / TEXT, lambda t: t.update({tokens: torch.zeros(9, 130).half()}))
    says = "reads text of width [120], its text encoders write 130"
    refused("base", "add", "x", folder, says=says)
    told("base", "add", "x", narrow.folder("sd1"))


def test_weights_that_could_not_be_worked_on(narrow: Narrow, hdb_home: Path, folder: Path) -> None:
    target = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q.weight"
    whole = (folder / UNET).read_bytes()

    def mixed(tensors: dict[str, torch.Tensor]) -> None:
        tensors[target] = tensors[target].float()

    def broken(tensors: dict[str, torch.Tensor]) -> None:
        tensors[target][0, 0] = torch.nan

    edit(folder / UNET, mixed)
    refused("base", "add", "x", folder, says="F16 and F32")
    (folder / UNET).write_bytes(whole)
    edit(folder / UNET, broken)
    refused("base", "add", "x", folder, says=f"not finite in unet.{target}")
    (folder / UNET).write_bytes(whole)
    vae = folder / "vae/diffusion_pytorch_model.safetensors"  # no target, and yet no picture
    whole_vae = vae.read_bytes()
    edit(vae, lambda t: t["decoder.conv_out.bias"].fill_(torch.inf))
    refused("base", "add", "x", folder, says="not finite in vae.decoder.conv_out.bias")
    vae.write_bytes(whole_vae)
    edit(folder / UNET, lambda t: t.update({k: v.float() for k, v in t.items()}))
    wide = told("base", "add", "x", folder)  # all of it in float32 is the same model
    assert wide["digest"] == told("base", "add", "y", narrow.folder("sd1"))["digest"]


def test_a_hypernetwork_of_another_base(narrow: Narrow, hdb_home: Path, tmp_path: Path) -> None:
    from hdbcli.method.hypernet import HyperNetwork
    from hdbcli.model.base import open_base
    from hdbcli.model.hypernetwork_file import save_hypernetwork
    from hdbcli.training.hypernetwork import new_hypernetwork
    from registry.tiny import WEIGHTS

    told("base", "add", "mine", narrow.folder("sd1"))
    give = ("base", "set-hypernetwork", "mine")
    refused(*give, WEIGHTS / "hypernetwork.safetensors", says="trained for tiny")
    file = tmp_path / "h.safetensors"
    save_hypernetwork(new_hypernetwork(open_base("mine", "cpu"), 0), file)
    assert hdb(*give, file).exit_code == 0
    assert told("base", "show", "mine")["hypernetwork"] is True
    model = new_hypernetwork(open_base("mine", "cpu"), 0)
    larger = HyperNetwork(replace(model.config, resolution=2 * model.config.resolution))
    save_hypernetwork(larger, tmp_path / "large.safetensors")
    refused(*give, tmp_path / "large.safetensors", says="reads faces of 128 px, mine draws 64")
    assert told("base", "verify", "mine")["name"] == "mine"  # still an added base
    assert hdb(*give, "--reset").exit_code == 0
    assert told("base", "show", "mine")["hypernetwork"] is False


def test_a_model_of_the_hub_comes_from_its_cache(
    narrow: Narrow, hdb_home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache, commit = tmp_path / "hub", "c" * 40
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    refused("base", "add", "x", "some/model", says="out of reach")
    model = cache / "models--some--model"
    shutil.copytree(narrow.folder("sd1"), model / "snapshots" / commit)
    (model / "refs").mkdir()
    (model / "refs" / "main").write_text(commit)
    found = told("base", "add", "x", "some/model")
    assert found["origin"] == f"some/model@{commit[:12]}"
    assert found["path"] == str(model / "snapshots" / commit)
    refused("base", "add", "y", "some/model", "--revision", "v9", says="some/model@v9")


def test_settings_that_cannot_be_read_spoil_nothing(narrow: Narrow, hdb_home: Path) -> None:
    told("base", "add", "mine", narrow.folder("sd1"))
    told("base", "add", "other", narrow.folder("sd1"))
    file = hdb_home / "bases" / "mine.json"
    values = json.loads(file.read_text())
    wrong = [[], {**values, "format": 9}, {**values, "added": {**values["added"], "path": 1}}]
    wrong.append({**values, "added": {**values["added"], "family": "sd9"}})
    for each in wrong:
        file.write_text(json.dumps(each))
        listed = hdb("base", "list", "--json")
        assert [base["name"] for base in json.loads(listed.stdout)["bases"]] == ["other", "tiny"]
        assert "mine" in listed.stderr
    file.write_text(json.dumps(values))
    assert told("base", "verify", "mine")["digest"] == values["added"]["digest"]
