"""Merging on Stable Diffusion's layouts: W + dW on every target, all else byte for byte."""

from __future__ import annotations

import hashlib
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.loaders.single_file_utils import (
    convert_ldm_clip_checkpoint,
    convert_open_clip_checkpoint,
)
from safetensors.torch import load_file, save_file

from hdbcli import merge_out
from hdbcli.basis import down_basis, up_basis
from hdbcli.errors import HdbError
from hdbcli.lidb import Theta, first_theta
from hdbcli.merge import Merge
from hdbcli.places import Checkpoint, open_checkpoint
from registry.errors import RegistryError
from registry.header import read_header
from registry.ldm import layout_of, rename
from registry.plugins import load_registry
from tests.architectures import TARGETS, components, save_folder, spec_of


def quiet(*_: object) -> None:
    pass


def theta_for(checkpoint: Checkpoint, size: float = 0.5) -> Theta:
    generator = torch.Generator().manual_seed(1)
    count = len(checkpoint.places)
    down = torch.randn((1, count, 2, 6), generator=generator)
    return Theta(down, torch.randn((1, count, 4, 2), generator=generator) * size)


def delta(checkpoint: Checkpoint, theta: Theta, name: str) -> torch.Tensor:
    index, (n, m) = list(checkpoint.places).index(name), checkpoint.shapes[name]
    core = theta.up[0, index] @ theta.down[0, index]
    return up_basis(1, name, 4, n) @ core @ down_basis(1, name, 6, m)


def tensor_hashes(file: Path) -> dict[str, str]:
    """Hash the stored bytes of every tensor."""
    return {
        key: hashlib.sha256(
            str(value.dtype).encode() + value.view(torch.uint8).numpy().tobytes()
        ).hexdigest()
        for key, value in ((k, v.contiguous()) for k, v in load_file(file).items())
    }


@pytest.fixture(scope="module", params=["sd1", "sd2", "sdxl"])
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def folder(family: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    where = tmp_path_factory.mktemp(family)
    save_folder(family, where)
    return where


def test_a_folder_gets_dw_on_targets_and_nothing_else(
    family: str, folder: Path, tmp_path: Path
) -> None:
    checkpoint = open_checkpoint(spec_of(family, folder))
    assert len(checkpoint.places) == TARGETS[family]
    theta = theta_for(checkpoint)
    (folder / "unet" / "notes.txt").write_text("kept")
    (folder / "unet" / "old.bin").write_text("left behind")
    merge_out.write_folder(Merge(checkpoint, theta, None), tmp_path / "m", "alice", quiet)
    assert (tmp_path / "m/unet/notes.txt").exists() and not (tmp_path / "m/unet/old.bin").exists()
    same = changed = 0
    for file in sorted(folder.rglob("*.safetensors")):
        before, after = load_file(file), load_file(tmp_path / "m" / file.relative_to(folder))
        assert list(before) == list(after)
        for key, value in before.items():
            name = f"{file.parent.name}.{key.removesuffix('.weight')}"
            if "text_encoder" in name and ".text_model." not in name:
                name = name.replace(".", ".text_model.", 1)
            if key.endswith(".weight") and name in checkpoint.places:
                wanted = value + delta(checkpoint, theta, name)
                torch.testing.assert_close(after[key], wanted, atol=1e-6, rtol=0)
                assert not torch.equal(after[key], value)
                changed += 1
            else:
                assert torch.equal(after[key], value)
                same += 1
    assert changed == TARGETS[family] and same > changed


def test_single_file_is_what_diffusers_reads_back(
    family: str, folder: Path, tmp_path: Path
) -> None:
    """A folder written as one original checkpoint, and that file merged again, both loaded by
    diffusers' own converters."""
    checkpoint = open_checkpoint(spec_of(family, folder))
    nobody, theta = theta_for(checkpoint, 0.0), theta_for(checkpoint)
    plain, merged = tmp_path / "plain.safetensors", tmp_path / "merged.safetensors"
    merge_out.write_single(Merge(checkpoint, nobody, None), plain, "nobody", quiet)
    again = open_checkpoint(spec_of(family, plain))
    assert (
        again.shapes == checkpoint.shapes and again.weights_digest() == checkpoint.weights_digest()
    )
    merge_out.write_single(Merge(again, theta, None), merged, "alice", quiet)
    for kind, part in ((UNet2DConditionModel, "unet"), (AutoencoderKL, "vae")):
        for file, worn in ((plain, None), (merged, theta)):
            loaded = kind.from_single_file(
                str(file), config=str(folder), subfolder=part, local_files_only=True
            ).state_dict()
            for key, value in components(family)[part].state_dict().items():
                name = f"{part}.{key.removesuffix('.weight')}"
                if worn is not None and key.endswith(".weight") and name in checkpoint.places:
                    value = value + delta(checkpoint, theta, name)
                torch.testing.assert_close(loaded[key], value, atol=1e-6, rtol=1e-6)
    hashes = tensor_hashes(plain), tensor_hashes(merged)
    targets = {place.key for place in again.places.values()}
    assert {key for key in hashes[0] if hashes[0][key] != hashes[1][key]} == targets


def test_text_encoders_of_a_single_file_are_what_diffusers_reads_back(
    family: str, folder: Path, tmp_path: Path
) -> None:
    checkpoint = open_checkpoint(spec_of(family, folder))
    theta, file = theta_for(checkpoint), tmp_path / "m.safetensors"
    merge_out.write_single(Merge(checkpoint, theta, None), file, "alice", quiet)
    tensors = load_file(file)
    modules = components(family)
    found = {}
    if family == "sd2":
        found["text_encoder"] = convert_open_clip_checkpoint(
            modules["text_encoder"], dict(tensors), prefix="cond_stage_model.model."
        )
    elif family == "sdxl":
        found["text_encoder_2"] = convert_open_clip_checkpoint(
            modules["text_encoder_2"], dict(tensors), prefix="conditioner.embedders.1.model."
        )
    if family != "sd2":
        prefix = "cond_stage_model.transformer." if family == "sd1" else None
        found["text_encoder"] = convert_ldm_clip_checkpoint(
            dict(tensors), remove_prefix=prefix or "conditioner.embedders.0.transformer."
        )
    for component, loaded in found.items():
        for key, value in modules[component].state_dict().items():
            long = key if key.startswith(("text_model.", "text_proj")) else f"text_model.{key}"
            name = f"{component}.{long.removesuffix('.weight')}"
            if key.endswith(".weight") and name in checkpoint.places:
                value = value + delta(checkpoint, theta, name)
            short = long.removeprefix("text_model.")
            got = loaded[long] if long in loaded else loaded[short]
            torch.testing.assert_close(got, value, atol=1e-6, rtol=1e-6)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    where = tmp_path_factory.mktemp("small")
    save_folder("sd1", where)
    return where


def test_a_cast_is_taken_once_at_the_end(small: Path, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(spec_of("sd1", small))
    theta = theta_for(checkpoint)
    merge_out.write_single(Merge(checkpoint, theta, None), tmp_path / "a.safetensors", "x", quiet)
    merge_out.write_single(Merge(checkpoint, theta, "bf16"), tmp_path / "b.safetensors", "x", quiet)
    wide, cast = load_file(tmp_path / "a.safetensors"), load_file(tmp_path / "b.safetensors")
    assert all(torch.equal(cast[key], value.bfloat16()) for key, value in wide.items())
    assert {value.dtype for value in wide.values()} == {torch.float32}


def test_the_header_says_what_it_is_and_its_hash(small: Path, tmp_path: Path) -> None:
    out = tmp_path / "m.safetensors"
    checkpoint = open_checkpoint(spec_of("sd1", small))
    merge_out.write_single(Merge(checkpoint, theta_for(checkpoint), None), out, "alice", quiet)
    header = read_header(out, 2**40)
    content = hashlib.sha256(out.read_bytes()[header.start :]).hexdigest()
    assert header.metadata["modelspec.hash_sha256"] == f"0x{content}"
    assert header.metadata["modelspec.architecture"] == "stable-diffusion-v1"
    assert header.metadata["modelspec.title"] == "alice" and header.start % 8 == 0


def test_the_published_layout_of_sd1() -> None:
    """Names and shapes of v1-5-pruned-emaonly, without its position_ids and noise schedule."""
    layout = layout_of("sd1")
    with torch.device("meta"):
        unet = UNet2DConditionModel(cross_attention_dim=768)
        vae = AutoencoderKL(
            block_out_channels=(128, 256, 512, 512),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            layers_per_block=2,
        )
    shapes = {}
    for component, module in (("unet", unet), ("vae", vae)):
        for key, value in module.state_dict().items():
            place = rename(component, key, layout)
            assert place is not None and place.key not in shapes
            shapes[place.key] = (*value.shape, 1, 1)[:4] if place.conv else tuple(value.shape)
    assert sum(key.startswith("model.diffusion_model.") for key in shapes) == 686
    assert sum(key.startswith("first_stage_model.") for key in shapes) == 248
    u, v = "model.diffusion_model.", "first_stage_model."
    assert shapes[f"{u}input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"] == (
        320,
        768,
    )
    assert shapes[f"{u}input_blocks.3.0.op.weight"] == (320, 320, 3, 3)
    assert shapes[f"{u}input_blocks.4.0.skip_connection.weight"] == (640, 320, 1, 1)
    assert shapes[f"{u}middle_block.2.out_layers.3.bias"] == (1280,)
    assert shapes[f"{u}output_blocks.2.1.conv.weight"] == (1280, 1280, 3, 3)
    assert shapes[f"{u}output_blocks.5.2.conv.weight"] == (1280, 1280, 3, 3)
    assert shapes[f"{u}output_blocks.11.0.in_layers.2.weight"] == (320, 640, 3, 3)
    assert shapes[f"{u}time_embed.0.weight"] == (1280, 320)
    assert shapes[f"{u}out.2.weight"] == (4, 320, 3, 3)
    assert shapes[f"{v}encoder.mid.attn_1.q.weight"] == (512, 512, 1, 1)
    assert shapes[f"{v}encoder.mid.attn_1.q.bias"] == (512,)
    assert shapes[f"{v}decoder.up.3.block.0.conv1.weight"] == (512, 512, 3, 3)
    assert shapes[f"{v}encoder.down.1.block.0.nin_shortcut.weight"] == (256, 128, 1, 1)


def test_what_cannot_be_merged(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec, out = spec_of("sd1", small), tmp_path / "m.safetensors"
    checkpoint = open_checkpoint(spec)
    good = Merge(checkpoint, theta_for(checkpoint), None)
    with pytest.raises(HdbError, match="unknown dtype 'int8'"):
        Merge(checkpoint, theta_for(checkpoint), "int8")
    with pytest.raises(RegistryError, match="family tiny has no single-file layout"):
        tiny = load_registry().get("tiny")
        own = open_checkpoint(tiny)
        Merge(own, first_theta(len(own.places), tiny.a, tiny.b), None).single_file()
    half = tmp_path / "half"
    shutil.copytree(small, half)
    (half / "text_encoder" / "model.safetensors").unlink()
    with pytest.raises(HdbError, match="text_encoder"):
        open_checkpoint(spec_of("sd1", half))
    with pytest.raises(HdbError, match="is gone"):
        open_checkpoint(spec_of("sd1", tmp_path / "nowhere"))
    with pytest.raises(HdbError, match="names no files"):
        open_checkpoint(replace(spec, files=None))
    for inside in (small, small / "unet" / "m.safetensors", small.parent):
        with pytest.raises(HdbError, match="overlap"):
            merge_out.check_apart(inside, small)
    merge_out.check_apart(tmp_path, small)
    nothing_free = shutil._ntuple_diskusage(1, 1, 0)
    with monkeypatch.context() as patched:
        patched.setattr(shutil, "disk_usage", lambda path: nothing_free)
        with pytest.raises(HdbError, match="free"):
            merge_out.write_single(good, out, "x", quiet)
    monkeypatch.setattr(Merge, "_delta", _interrupt)
    for write, target in ((merge_out.write_single, out), (merge_out.write_folder, tmp_path / "f")):
        with pytest.raises(KeyboardInterrupt):
            write(good, target, "x", quiet)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["half"]


def test_a_damaged_base_is_noticed(small: Path, tmp_path: Path) -> None:
    shutil.copytree(small, tmp_path / "b")
    file = tmp_path / "b" / "text_encoder" / "model.safetensors"
    tensors = load_file(file)
    key = next(key for key in tensors if key.endswith("q_proj.weight"))
    tensors[key][0, 0] = torch.nan
    save_file(tensors, file)
    checkpoint = open_checkpoint(spec_of("sd1", tmp_path / "b"))
    with pytest.raises(HdbError, match="gets numbers that are not finite"):
        merge_out.write_folder(
            Merge(checkpoint, theta_for(checkpoint), None), tmp_path / "m", "x", quiet
        )
    assert not (tmp_path / "m").exists()


def _interrupt(*_: object) -> torch.Tensor:
    raise KeyboardInterrupt
