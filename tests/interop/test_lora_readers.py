"""What four readers make of an exported LoRA, on a base with Stable Diffusion 1.5's real blocks."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING

import pytest
import torch
from commands import hdb as run
from diffusers import (
    AutoencoderTiny,
    DDIMScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from identities import TINY, describe
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoTokenizer, CLIPTextConfig, CLIPTextModel

from hdbcli.identity.file import save
from hdbcli.interop import diffusers_reader, export
from hdbcli.interop.diffusers_reader import load_for_real
from hdbcli.interop.export import export_tensors, read_by_all, refuse_unread
from hdbcli.interop.lora_readers import a1111, comfyui, invokeai, layout_of, replay
from hdbcli.method.inject import eject, inject
from hdbcli.method.lidb import Theta, first_theta
from hdbcli.model.base import Base
from registry import store
from registry.checkpoints.ldm import canonical
from registry.errors import HdbError
from registry.plugins import load_registry
from registry.stable_diffusion.backbone import StableDiffusion
from registry.stable_diffusion.families import FAMILIES
from registry.stable_diffusion.loading import load_folder
from registry.stable_diffusion.uncompiled import quiet
from registry.tiny import WEIGHTS

if TYPE_CHECKING:
    from cutdown import Narrow

Tensors = dict[str, Tensor]
XL = ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D")
XL_UP = ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D")


def unet_of(context: int) -> UNet2DConditionModel:
    """Return a UNet of diffusers' default blocks, which are SD 1.5's, but narrow."""
    widths = (32, 64, 128, 128)
    return UNet2DConditionModel(
        sample_size=8, block_out_channels=widths, cross_attention_dim=context
    )


def text_encoder_of(layers: int) -> CLIPTextModel:
    sizes = {"hidden_size": 64, "intermediate_size": 64, "vocab_size": 64}
    marks = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    heads = {"num_hidden_layers": layers, "num_attention_heads": 4}
    return CLIPTextModel(CLIPTextConfig(**sizes, **heads, **marks))


def injected_into(backbone: object, more: dict[str, tuple[str, ...]] | None = None) -> Base:
    spec = replace(load_registry().get("tiny"), name="small", a=16, b=8)
    spec = replace(spec, targets={**FAMILIES["sd1"].targets, **(more or {})})
    place = spec.targets, spec.a, spec.b, spec.basis_seed, canonical
    injected = inject(backbone.components, *place)
    return Base(spec, backbone, injected, "cpu")


def small_sd(context: int = 768) -> Base:
    """Return a base with the blocks, layers and names of SD 1.5, 192 targets, narrow and random."""
    torch.manual_seed(0)
    with quiet():
        pipeline = StableDiffusionPipeline(
            vae=AutoencoderTiny.from_pretrained(WEIGHTS, subfolder="vae"),
            text_encoder=text_encoder_of(12),
            tokenizer=AutoTokenizer.from_pretrained(WEIGHTS / "tokenizer"),
            unet=unet_of(context),
            scheduler=DDIMScheduler(steps_offset=1, clip_sample=False),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
    return injected_into(StableDiffusion(pipeline))


@pytest.fixture(scope="module")
def small() -> Base:
    return small_sd()


def random_theta(base: Base) -> Theta:
    first = base.first_theta(2)
    generator = torch.Generator().manual_seed(0)
    return Theta(first.down, 0.2 * torch.randn(first.up.shape, generator=generator))


@pytest.fixture(scope="module")
def kohya(small: Base) -> Tensors:
    return export_tensors(small, random_theta(small), "kohya", "fp32")


@pytest.fixture(scope="module")
def peft(small: Base) -> Tensors:
    return export_tensors(small, random_theta(small), "diffusers", "fp32")


@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
def test_every_reader_maps_all_192_kohya_targets(small: Base, dtype: str) -> None:
    theta = random_theta(small)
    assert len(small.injected.layers) == 192
    own = small_sd()
    readings = read_by_all(own, theta, export_tensors(small, theta, "kohya", dtype))
    names = ["diffusers fp32", "diffusers fp16", "ComfyUI", "A1111/Forge", "InvokeAI"]
    assert [r.reader for r in readings] == names
    assert all((r.ok, r.mapped, r.total) == (True, 192, 192) for r in readings), readings
    refuse_unread(readings, "kohya")


def test_every_reader_maps_the_convolutions() -> None:
    convolutions = FAMILIES["sd1"].target_sets["all"]["unet"]
    readings = []
    for _ in range(2):  # the check uses a base up
        base = small_sd()
        eject(base.backbone.components)
        base = injected_into(base.backbone, {"unet": convolutions})
        readings = readings or [base]
    theta = random_theta(base)
    tensors = export_tensors(base, theta, "kohya", "fp16")
    assert tensors["lora_unet_mid_block_resnets_1_conv2.lora_down.weight"].shape == (2, 128, 3, 3)
    found = read_by_all(readings[0], theta, tensors)
    assert all((r.ok, r.mapped) == (True, 288) for r in found), found
    flat = {key: value.flatten(1) if value.dim() > 1 else value for key, value in tensors.items()}
    assert all(r.mapped < 288 for r in replay(base, flat))  # matrices of convolutions are refused


def test_only_diffusers_reads_its_own_keys(small: Base, peft: Tensors) -> None:
    readings = read_by_all(small_sd(), random_theta(small), peft)
    assert [r.mapped for r in readings] == [192, 192, 64, 0, 0]
    comfy, a1, invoke = readings[2:]
    # ComfyUI finds the text encoder's 48 and 16 feed-forward layers, none of 128 in attention.
    unet = [name for name in comfy.lost if name.startswith("unet.")]
    assert len(unet) == 128 and all(".attn" in name for name in unet)
    assert len(a1.unread) == len(invoke.unread) == len(peft) == 384
    refuse_unread(readings, "diffusers")
    with pytest.raises(HdbError, match="ComfyUI would not apply it all: 64 of 192"):
        refuse_unread(readings, "kohya")
    old = {  # the control: with the spelling of old it finds them all
        key.replace(".to_out.0.", ".to_out.").replace(".to_", ".processor.to_")
        if key.startswith("unet.")
        else key: value
        for key, value in peft.items()
    }
    assert comfyui(small, old).ok and not a1111(small, old).ok


CUT = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_v"
MID = "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_v"


def edits(kohya: Tensors) -> dict[str, Tensors]:
    """Return files in which one thing each is wrong."""
    up, down, alpha = (f"{CUT}.{part}" for part in ("lora_up.weight", "lora_down.weight", "alpha"))
    return {
        "up missing": {k: v for k, v in kohya.items() if k != up},
        "down missing": {k: v for k, v in kohya.items() if k != down},
        "target missing": {k: v for k, v in kohya.items() if not k.startswith(CUT)},
        "half alpha": kohya | {alpha: torch.tensor(1.0)},
        "too narrow": kohya | {down: kohya[down][:, :-1].contiguous()},
        "extra": kohya | {"lora_unet_extra.lora_down.weight": torch.zeros(2, 4)},
        "misnamed": {k.replace(CUT, CUT[:-1] + "w"): v for k, v in kohya.items()},
    }


@pytest.mark.parametrize("reader", [comfyui, a1111, invokeai])
def test_what_is_missing_extra_or_wrong_fails(small: Base, kohya: Tensors, reader: object) -> None:
    assert reader(small, kohya).ok
    for name, tensors in edits(kohya).items():
        reading = reader(small, tensors)
        assert not reading.ok, name
        assert reading.lost == (() if name == "extra" else (MID,)), name
        assert bool(reading.unread) == (name in ("extra", "misnamed")), name
        with pytest.raises(HdbError, match=reading.reader):
            refuse_unread([reading], "kohya")


def test_a_missing_alpha_is_a_scale_of_one(small: Base, kohya: Tensors) -> None:
    bare = {key: value for key, value in kohya.items() if not key.endswith(".alpha")}
    assert all(reading.ok for reading in replay(small, bare))


def test_diffusers_is_really_asked(
    small: Base, kohya: Tensors, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(diffusers_reader, "RUNS_IN", {"fp32": torch.float32})
    theta, own = random_theta(small), small_sd()
    files = edits(kohya)
    del files["half alpha"]  # it drops the alpha of one layer alone; of all it does not
    files["half"] = {k: torch.tensor(1.0) if k.endswith("alpha") else v for k, v in kohya.items()}
    for name, tensors in files.items():
        for reading in load_for_real(own, theta, tensors):
            assert not reading.ok, name
            if name == "target missing":
                assert reading.lost == (MID,) and reading.mapped == 191
        own = small_sd()
    other = Theta(theta.down, theta.up * 1.01)  # the file of another, nearly the same, identity
    assert [r.mapped for r in load_for_real(own, other, kohya)] == [0]


def test_invokeai_goes_by_the_width_of_the_text(small: Base) -> None:
    parts = {"unet": unet_of(64), "text_encoder": text_encoder_of(2)}
    cut = injected_into(SimpleNamespace(components=parts))
    tensors = export_tensors(cut, random_theta(cut), "kohya", "fp32")
    reading = invokeai(cut, tensors)
    assert not reading.asked and "64 wide, 768, 1024, 2048 are known" in (reading.problem or "")
    assert comfyui(cut, tensors).ok  # which asks for blocks alone


@pytest.mark.parametrize("context", [1024, 2048])
def test_the_readers_know_stable_diffusion_2_and_xl(context: int) -> None:
    components = {"unet": unet_of(context), "text_encoder": text_encoder_of(2)}
    more = {}
    if context == 2048:
        blocks = {"down_block_types": XL, "up_block_types": XL_UP, "norm_num_groups": 16}
        depths = {"transformer_layers_per_block": (1, 2, 10), "attention_head_dim": 8}
        components["unet"] = UNet2DConditionModel(
            block_out_channels=(16, 32, 32), cross_attention_dim=context, **blocks, **depths
        )
        components["text_encoder_2"] = text_encoder_of(3)
        more["text_encoder_2"] = load_registry().get("tiny").targets["text_encoder"]
    base = injected_into(SimpleNamespace(components=components), more)
    xl = context == 2048
    assert layout_of(base) == ((0, 2, 10) if xl else (1, 1, 1, 0))
    for family in ("sd2", "sdxl") if xl else ("sd2",):  # names of both codes are read
        own = replace(base, spec=replace(base.spec, family=family))
        tensors = export_tensors(own, random_theta(own), "kohya", "fp16")
        assert any("input_blocks" in key for key in tensors) == (family == "sdxl")
        assert any("lora_te2_" in key for key in tensors) == xl
        readings = replay(own, tensors)
        assert all(reading.ok for reading in readings), readings


def test_every_reader_maps_xl_by_the_names_of_the_original_code(narrow: Narrow) -> None:
    def xl() -> Base:
        spec = replace(load_registry().get("tiny"), name="xl", family="sdxl", a=16, b=8)
        spec = replace(spec, targets=FAMILIES["sdxl"].targets)
        backbone = load_folder(narrow.folder("sdxl"), "cpu", "float32", True)
        place = spec.targets, spec.a, spec.b, spec.basis_seed, canonical
        injected = inject(backbone.components, *place)
        return Base(spec, backbone, injected, "cpu")

    base = xl()
    theta = random_theta(base)
    tensors = export_tensors(base, theta, "kohya", "fp32")
    assert "lora_unet_middle_block_1_transformer_blocks_0_attn1_to_q.alpha" in tensors
    assert not any("attentions" in key for key in tensors)
    readings = read_by_all(xl(), theta, tensors)
    assert [r.reader for r in readings[:2]] == ["diffusers fp32", "diffusers fp16"]
    assert all(reading.ok for reading in readings[:2]), readings


def test_names_that_collide_are_refused(small: Base) -> None:
    layer = next(iter(small.injected.layers.values()))
    twins = replace(small.injected, layers={"unet.a.to_q": layer, "unet.a_to.q": layer})
    theta = first_theta(2, 16, 8)
    base = replace(small, injected=twins)
    with pytest.raises(HdbError, match="would be named 'lora_unet_a_to_q' in kohya"):
        export_tensors(base, theta, "kohya", "fp32")
    assert len(export_tensors(base, theta, "diffusers", "fp32")) == 4  # the control


def hdb(*words: object) -> tuple[int, str, str]:
    result = run(*words)
    return result.exit_code, result.stdout, result.stderr


def test_the_command_tells_each_reader_and_keeps_only_what_is_proven(
    tiny: Base, hdb_home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = tiny.first_theta(2)
    theta = Theta(first.down, 0.1 * torch.randn(first.up.shape))
    save(describe(tiny, theta, ""), store.path_of("alice"))
    out = tmp_path / "a.safetensors"
    code, said, told = hdb("export", "alice", "-o", out, "--check")
    assert code == 0, told
    assert said.count(f"{TINY[0]} of {TINY[0]} targets map") == 2  # diffusers in fp32 and fp16
    assert said.count("knows no such base") == 3  # the others know Stable Diffusion alone
    code, said, _ = hdb("export", "alice", "-o", out, "--check", "--json", "--force")
    values = json.loads(said)
    assert code == 0 and values["bytes"] == out.stat().st_size and values["rank"] == 2
    assert [r["ok"] for r in values["readers"]] == [True, True, False, False, False]
    assert [r["asked"] for r in values["readers"]] == [True, True, False, False, False]

    def without_one(*arguments: object) -> Tensors:
        tensors = export_tensors(*arguments)
        return dict(list(tensors.items())[3:])

    monkeypatch.setattr(export, "export_tensors", without_one)
    before = load_file(out)
    code, said, told = hdb("export", "alice", "-o", out, "--check", "--force")
    assert (
        code == 1
        and not said
        and f"{TINY[0] - 1} of {TINY[0]}" in told
        and told.startswith("error: diffusers")
    )
    assert load_file(out).keys() == before.keys()  # as it was
    assert hdb("export", "alice", "-o", tmp_path / "b.safetensors")[0] == 0  # unchecked, it passes
    monkeypatch.setattr("hdbcli.interop.diffusers_reader.find_spec", lambda name: None)
    code, said, told = hdb("export", "alice", "-o", tmp_path / "c.safetensors", "--check")
    assert code == 1 and not said and "pip install peft" in told
    assert sorted(path.name for path in tmp_path.glob("*.safetensors")) == [
        "a.safetensors",
        "b.safetensors",
    ]
