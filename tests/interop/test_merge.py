"""Merging on Stable Diffusion's layouts: W + dW on every target, all else byte for byte."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from commands import ok, told
from diffusers import AutoencoderKL, UNet2DConditionModel
from PIL import Image
from safetensors.torch import load_file, save_file

from hdbcli.interop import merged_files
from hdbcli.interop.merge import Merge
from hdbcli.method.basis import down_basis, up_basis
from hdbcli.method.lidb import Theta, first_theta
from hdbcli.model.files import Checkpoint, open_checkpoint
from registry.bases import added
from registry.bases.settings import Added
from registry.checkpoints.ldm import canonical, layout_of, rename
from registry.checkpoints.safetensors import read_header
from registry.errors import HdbError
from registry.plugins import load_registry
from registry.spec import BaseSpec

if TYPE_CHECKING:
    from cutdown import Narrow

ASTRONAUT = Path(__file__).parents[1] / "data" / "astronaut.png"
TARGETS = {"sd1": 192, "sd2": 236, "sdxl": 806}
FAMILIES = pytest.mark.parametrize("family", list(TARGETS))


def quiet(*_: object) -> None:
    pass


def spec_of(family: str, files: Path) -> BaseSpec:
    return added.spec_of(Added("narrow", str(files), family, "epsilon", 64, "", {}))


def theta_for(checkpoint: Checkpoint, size: float = 0.1) -> Theta:
    generator = torch.Generator().manual_seed(1)
    spec, count = checkpoint.spec, len(checkpoint.places)
    down = torch.randn((1, count, 2, spec.a), generator=generator) * size
    return Theta(down, torch.randn((1, count, spec.b, 2), generator=generator) * size)


def plus_delta(
    checkpoint: Checkpoint, theta: Theta, name: str, weight: torch.Tensor
) -> torch.Tensor:
    """Return W + dW of a target as float16, each product in turn."""
    spec, (n, m) = checkpoint.spec, checkpoint.shapes[name]
    index = list(checkpoint.places).index(name)
    up = up_basis(spec.basis_seed, name, spec.b, n) @ theta.up[0, index]
    down = theta.down[0, index] @ down_basis(spec.basis_seed, name, spec.a, m)
    return (weight.float() + up @ down).half()


def assert_rounded_once(got: torch.Tensor, wanted: torch.Tensor) -> None:
    """Equal but where the last bit of a float32 sum tips the rounding to float16."""
    assert got.dtype == wanted.dtype == torch.float16
    assert (got != wanted).float().mean() < 0.01
    torch.testing.assert_close(got, wanted, atol=1e-6, rtol=2e-3)


def tensor_hashes(file: Path) -> dict[str, str]:
    """Hash the stored bytes of every tensor."""
    return {
        key: hashlib.sha256(
            str(value.dtype).encode() + value.reshape(-1).view(torch.uint8).numpy().tobytes()
        ).hexdigest()
        for key, value in ((k, v.contiguous()) for k, v in load_file(file).items())
    }


@FAMILIES
def test_a_folder_gets_dw_on_targets_and_nothing_else(
    family: str, narrow: Narrow, tmp_path: Path
) -> None:
    folder = narrow.folder(family)
    checkpoint = open_checkpoint(spec_of(family, folder))
    assert len(checkpoint.places) == TARGETS[family]
    theta, out = theta_for(checkpoint), tmp_path / "m"
    merged_files.write_folder(Merge(checkpoint, theta, None), out, "alice", quiet)
    same = changed = 0
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        again = out / file.relative_to(folder)
        if file.suffix != ".safetensors":
            assert again.read_bytes() == file.read_bytes() or file.name == "model_index.json"
            continue
        before, after = load_file(file), load_file(again)
        assert list(before) == list(after)
        for key, value in before.items():
            component = file.parent.name
            name = f"{component}.{canonical(component, key.removesuffix('.weight'))}"
            if key.endswith(".weight") and name in checkpoint.places:
                assert_rounded_once(after[key], plus_delta(checkpoint, theta, name, value))
                assert not torch.equal(after[key], value)
                changed += 1
            else:
                assert torch.equal(after[key], value)
                same += 1
    assert changed == TARGETS[family] and same > changed


def test_a_folder_leaves_weights_without_the_identity_behind(
    narrow: Narrow, tmp_path: Path
) -> None:
    folder = tmp_path / "base"
    shutil.copytree(narrow.folder("sd1"), folder)
    (folder / "unet" / "diffusion_pytorch_model.bin").write_text("x")
    (folder / "unet" / "notes.txt").write_text("x")
    (folder / "samples").mkdir()
    checkpoint = open_checkpoint(spec_of("sd1", folder))
    merged_files.write_folder(
        Merge(checkpoint, theta_for(checkpoint), None), tmp_path / "m", "x", quiet
    )
    kept = {path.name for path in (tmp_path / "m" / "unet").iterdir()}
    assert kept == {"config.json", "diffusion_pytorch_model.safetensors", "notes.txt"}
    assert not (tmp_path / "m" / "samples").exists()


@FAMILIES
def test_a_folder_as_a_single_file_and_back(family: str, narrow: Narrow, tmp_path: Path) -> None:
    """Against another writer of that layout; then that file is merged, all else byte for byte."""
    folder, theirs = narrow.folder(family), narrow.single(family)
    checkpoint = open_checkpoint(spec_of(family, folder))
    plain, theta = theta_for(checkpoint, 0.0), theta_for(checkpoint)
    mine = tmp_path / "mine.safetensors"
    merged_files.write_single(Merge(checkpoint, plain, None), mine, "plain", quiet)
    hashes, wanted = tensor_hashes(mine), tensor_hashes(theirs)
    assert hashes.items() <= wanted.items()
    unread = [key for key in wanted if key not in hashes]
    assert len(unread) < 20 and all("resblocks.23." in key or len(key) < 80 for key in unread)
    again = open_checkpoint(spec_of(family, theirs))
    assert again.shapes == checkpoint.shapes
    assert again.weights_digest() == checkpoint.weights_digest()
    merged, direct = tmp_path / "merged.safetensors", tmp_path / "direct.safetensors"
    merged_files.write_single(Merge(again, theta, None), merged, "alice", quiet)
    merged_files.write_single(Merge(checkpoint, theta, None), direct, "alice", quiet)
    after = tensor_hashes(merged)
    assert list(load_file(merged)) == list(load_file(theirs))
    targets = {place.key for place in again.places.values()}
    assert {key for key in wanted if wanted[key] != after[key]} == targets
    assert tensor_hashes(direct).items() <= after.items()


@pytest.fixture()
def small(narrow: Narrow) -> Path:
    return narrow.folder("sd1")


def test_a_cast_is_taken_once_at_the_end(small: Path, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(spec_of("sd1", small))
    theta = theta_for(checkpoint)
    merged_files.write_single(
        Merge(checkpoint, theta, "fp32"), tmp_path / "a.safetensors", "x", quiet
    )
    merged_files.write_single(
        Merge(checkpoint, theta, "bf16"), tmp_path / "b.safetensors", "x", quiet
    )
    wide, cast = load_file(tmp_path / "a.safetensors"), load_file(tmp_path / "b.safetensors")
    assert all(torch.equal(cast[key], value.bfloat16()) for key, value in wide.items())
    assert {value.dtype for value in wide.values()} == {torch.float32}


def test_fp32_is_the_exact_sum_rounded_once(small: Path, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(spec_of("sd1", small))
    theta = theta_for(checkpoint)
    merged_files.write_folder(Merge(checkpoint, theta, "fp32"), tmp_path / "m", "x", quiet)
    spec, worst = checkpoint.spec, 0.0
    before, after = (
        {file: load_file(root / file.relative_to(small)) for file in checkpoint.headers}
        for root in (small, tmp_path / "m")
    )
    for i, (name, place) in enumerate(checkpoint.places.items()):
        n, m = place.shape
        weight = before[place.file][place.key].double()
        merged = after[place.file][place.key].double()
        core = (theta.up[0, i] @ theta.down[0, i]).double()
        up = up_basis(spec.basis_seed, name, spec.b, n).double()
        down = down_basis(spec.basis_seed, name, spec.a, m).double()
        whole = weight + up @ core @ down
        assert (whole - weight).abs().max() > 1e-3  # the identity is in it
        error = (merged - whole).abs() / (2**-24 * whole.abs() + 1e-7)
        worst = max(worst, float(error.max()))
    assert worst < 1.5  # half a unit in the last place, and the sum's own rounding


def test_the_header_says_what_it_is_and_its_hash(small: Path, tmp_path: Path) -> None:
    out = tmp_path / "m.safetensors"
    checkpoint = open_checkpoint(spec_of("sd1", small))
    merged_files.write_single(Merge(checkpoint, theta_for(checkpoint), None), out, "alice", quiet)
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
    with pytest.raises(HdbError, match="family tiny has no single-file layout"):
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
            merged_files.check_apart(inside, small)
    merged_files.check_apart(tmp_path, small)
    nothing_free = shutil._ntuple_diskusage(1, 1, 0)
    with monkeypatch.context() as patched:
        patched.setattr(shutil, "disk_usage", lambda path: nothing_free)
        with pytest.raises(HdbError, match="free"):
            merged_files.write_single(good, out, "x", quiet)
    monkeypatch.setattr(Merge, "_factors", _interrupt)
    for write, target in (
        (merged_files.write_single, out),
        (merged_files.write_folder, tmp_path / "f"),
    ):
        with pytest.raises(KeyboardInterrupt):
            write(good, target, "x", quiet)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["half"]


def test_a_folder_that_cannot_be_replaced_stays(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = open_checkpoint(spec_of("sd1", small))
    merge, out = Merge(checkpoint, theta_for(checkpoint), None), tmp_path / "m"
    out.mkdir()
    (out / "model_index.json").write_text("mine")
    moves = iter([os.replace, _fail, os.replace])  # the old one is away, the new one does not come
    with monkeypatch.context() as patched:
        patched.setattr(
            "hdbcli.interop.merged_files.os.replace", lambda *paths: next(moves)(*paths)
        )
        with pytest.raises(HdbError, match=r"could not be written .*is kept in ") as error:
            merged_files.write_folder(merge, out, "x", quiet)
    kept = Path(str(error.value).rpartition(" is kept in ")[2])
    assert {path.name for path in tmp_path.iterdir()} == {"m", kept.name} and not list(moves)
    assert (out / "model_index.json").read_text() == "mine"
    assert (kept / "unet" / "diffusion_pytorch_model.safetensors").is_file()
    shutil.rmtree(kept)
    merged_files.write_folder(merge, out, "x", quiet)
    assert [path.name for path in tmp_path.iterdir()] == ["m"]
    assert (out / "model_index.json").read_text() != "mine"


@pytest.mark.parametrize("number", [errno.ESPIPE, errno.EPERM, errno.EIO])
def test_a_file_is_the_same_where_it_is_written_from_front_to_back_alone(
    number: int, small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint, out = open_checkpoint(spec_of("sd1", small)), tmp_path / "m.safetensors"
    merge, path_open = Merge(checkpoint, theta_for(checkpoint), None), Path.open
    merged_files.write_single(merge, out, "x", quiet)
    wanted = out.read_bytes()

    def from_the_front(path: Path, mode: str = "r", **options: Any) -> Any:
        if mode == "rb+":
            raise OSError(number, os.strerror(number))
        return path_open(path, mode, **options)

    monkeypatch.setattr(Path, "open", from_the_front)
    if number == errno.EIO:  # the control: a broken disk is not tried again
        with pytest.raises(HdbError, match=f"cannot write {out}: {os.strerror(number)}"):
            merged_files.write_single(merge, out, "x", quiet)
    else:
        merged_files.write_single(merge, out, "x", quiet)
    assert out.read_bytes() == wanted and os.listdir(tmp_path) == [out.name]


@pytest.mark.parametrize("number", [errno.EPERM, errno.ENOSYS])
def test_a_folder_is_copied_where_none_can_be_renamed(
    number: int, small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    checkpoint, out = open_checkpoint(spec_of("sd1", small)), tmp_path / "m"
    merge = Merge(checkpoint, theta_for(checkpoint), None)
    monkeypatch.setattr("hdbcli.interop.merged_files.os.replace", refused)
    merged_files.check_folder(out, False)
    merged_files.write_folder(merge, out, "x", quiet)
    assert [path.name for path in tmp_path.iterdir()] == ["m"]
    assert (out / "unet" / "diffusion_pytorch_model.safetensors").is_file()
    reason = f"cannot write {out}: {os.strerror(number)}; give another --out"
    with pytest.raises(HdbError, match=reason):  # half a copy over the older one could cost both
        merged_files.check_folder(out, True)
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


def test_a_damaged_base_is_noticed(small: Path, tmp_path: Path) -> None:
    shutil.copytree(small, tmp_path / "b")
    file = tmp_path / "b" / "text_encoder" / "model.safetensors"
    tensors = load_file(file)
    key = next(key for key in tensors if key.endswith("q_proj.weight"))
    tensors[key][0, 0] = torch.nan
    save_file(tensors, file)
    checkpoint = open_checkpoint(spec_of("sd1", tmp_path / "b"))
    with pytest.raises(HdbError, match="gets numbers that are not finite"):
        merged_files.write_folder(
            Merge(checkpoint, theta_for(checkpoint), None), tmp_path / "m", "x", quiet
        )
    assert not (tmp_path / "m").exists()


def test_a_merged_model_is_added_and_draws_the_same(
    narrow: Narrow, hdb_home: Path, tmp_path: Path
) -> None:
    """The base adapted to alice, and three checkpoints with her in them, as bases of their own."""
    ok("base", "add", "plain", narrow.folder("sd1"))
    ok("new", ASTRONAUT, "alice", "--base", "plain", "--steps", 1, "--yes")
    ok("merge", "alice=3", "--out", tmp_path / "folder", "--dtype", "fp32")
    ok("merge", "alice=3", "--out", tmp_path / "one.safetensors", "--dtype", "fp32")
    ok("base", "add", "one", tmp_path / "one.safetensors")
    ok("base", "add", "folder", tmp_path / "folder")
    ok("merge", "alice=0", "--base", "one", "--out", tmp_path / "unpacked")
    ok("base", "add", "unpacked", tmp_path / "unpacked")
    words = ["a [V] face", "-n", 1, "--seed", 0, "--steps", 2, "--negative", "bark skin"]
    ok("gen", "alice", *words, "--strength", 3, "-o", tmp_path / "adapted.png")
    adapted = picture(tmp_path / "adapted.png")
    for base in ("folder", "one", "unpacked", "plain"):
        plain = ["--strength", 0, "--base", base, "-o", tmp_path / "p.png"]
        ok("gen", "alice", *words, *plain)
        error = ((picture(tmp_path / "p.png") - adapted) ** 2).mean()
        assert (-10 * np.log10(error + 1e-12) > 50) == (base != "plain"), base
        (tmp_path / "p.png").unlink()
    said = read_header(tmp_path / "one.safetensors", 2**40).metadata
    assert said["modelspec.prediction_type"] == "epsilon"
    ok("refine", "alice", ASTRONAUT, "--base", "one", "--steps", 1)
    assert told("show", "alice")["base"] == "one"


def picture(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path)) / 255


def _fail(*_: object) -> None:
    raise OSError("no")


def _interrupt(*_: object) -> torch.Tensor:
    raise KeyboardInterrupt


def test_convolutions_are_merged_in_both_layouts(narrow: Narrow, tmp_path: Path) -> None:
    """A folder and a single file of one base become the same single file, convolutions included.

    They are 2 fewer than in the published model, whose levels differ in width and need shortcuts.
    """
    merged = []
    for number, files in enumerate((narrow.folder("sd1"), narrow.single("sd1"))):
        checkpoint = open_checkpoint(spec_of("sd1", files).with_targets("all"))
        assert len(checkpoint.places) == 286
        out = tmp_path / f"{number}.safetensors"
        theta = theta_for(checkpoint)
        merged_files.write_single(Merge(checkpoint, theta, None), out, "alice", quiet)
        merged.append(load_file(out))
        before = load_file(narrow.single("sd1"))
        name = "unet.up_blocks.1.upsamplers.0.conv"
        key = "model.diffusion_model.output_blocks.5.2.conv.weight"
        matrix = plus_delta(checkpoint, theta, name, before[key].flatten(1))
        assert_rounded_once(merged[-1][key], matrix.view_as(before[key]))
    assert merged[0].keys() <= merged[1].keys()
    assert all(torch.equal(value, merged[1][key]) for key, value in merged[0].items())
    changed = [key for key in merged[0] if not torch.equal(merged[0][key], before[key])]
    assert len(changed) == 286
