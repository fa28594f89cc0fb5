"""A foreign LoRA gives the weights that its own library gives: PEFT, diffusers and LyCORIS write
files and add them, hdb adds the same files."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from lycoris.functional.general import weight_decompose
from lycoris.modules.full import FullModule
from lycoris.modules.locon import LoConModule
from lycoris.modules.loha import LohaModule
from lycoris.modules.lokr import LokrModule
from lycoris.modules.norms import NormModule
from peft import LoHaConfig, LoKrConfig, LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from hdbcli.interop import lora_stack
from hdbcli.model.base import Base, load_base
from registry.errors import HdbError, HdbWarning
from registry.plugins import load_registry

EXACT = 1e-6  # largest difference of a weight in float32
LINEAR = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
CONV = "mid_block.resnets.0.conv1"


@pytest.fixture(scope="module")
def base() -> Base:
    return load_base(load_registry().get("tiny"), "cpu")


@pytest.fixture
def unet(base: Base) -> Iterator[nn.Module]:
    """Give the test the UNet of `tiny`, as diffusers has it, and put the base's weights back."""
    kept = {name: value.clone() for name, value in everything(base).items()}
    yield plain_unet()
    for name, value in everything(base).items():
        value.copy_(kept[name])


def plain_unet() -> Any:
    from diffusers import UNet2DConditionModel

    from registry.tiny import WEIGHTS

    return UNet2DConditionModel.from_pretrained(WEIGHTS / "unet")


def everything(base: Base) -> dict[str, Tensor]:
    return {
        f"{component}.{name.replace('.base.', '.')}": value.data
        for component, module in base.backbone.components.items()
        for name, value in module.named_parameters()
    }


def add(base: Base, file: Path, strength: float = 1.0) -> lora_stack.Stacked:
    (stacked,) = lora_stack.stack(base, [lora_stack.read(f"{file}={strength}")])
    assert not stacked.unread
    return stacked


def same(base: Base, expected: Mapping[str, Tensor], plain: Mapping[str, Tensor]) -> int:
    """Assert that the base's UNet has the expected weights; count those that are not the plain."""
    mine = everything(base)
    for name, value in expected.items():
        assert (mine[f"unet.{name}"] - value).abs().max() < EXACT, name
    return sum(bool((plain[name] - value).abs().max() > 1e-4) for name, value in expected.items())


@torch.no_grad()
def shaken(module: nn.Module) -> nn.Module:
    """Make the parameters of adapters random: new ones change nothing."""
    generator = torch.Generator().manual_seed(0)
    for name, value in module.named_parameters():
        whole = "modules_to_save." in name or (name.endswith("bias") and value.requires_grad)
        if whole or any(part in name for part in ("lora_", "hada_", "lokr_")):
            value.add_(torch.randn(value.shape, generator=generator) / 8)
    return module


TARGETS = ["to_q", "to_out.0", "conv1", "proj_in"]
PEFTS = {
    "lora": LoraConfig(r=4, lora_alpha=12, target_modules=TARGETS),
    "all biases": LoraConfig(r=4, lora_alpha=2, target_modules=["to_out.0", "conv1"], bias="all"),
    "bias": LoraConfig(r=4, lora_alpha=2, target_modules=["to_out.0", "conv1"], lora_bias=True),
    "rslora": LoraConfig(r=4, lora_alpha=3, target_modules=TARGETS, use_rslora=True),
    "dora": LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS, use_dora=True),
    "whole": LoraConfig(r=4, target_modules=["to_q"], modules_to_save=["conv_out"]),
    "loha": LoHaConfig(r=4, alpha=2, target_modules=TARGETS),
    "loha core": LoHaConfig(r=4, alpha=2, target_modules=TARGETS, use_effective_conv2d=True),
    "lokr": LoKrConfig(r=4, alpha=2, target_modules=TARGETS),
    "lokr core": LoKrConfig(r=2, alpha=2, target_modules=TARGETS, use_effective_conv2d=True),
    "lokr both": LoKrConfig(r=2, alpha=1, target_modules=TARGETS, decompose_both=True),
    "lokr full": LoKrConfig(r=99, alpha=33, target_modules=TARGETS),
}


@pytest.mark.parametrize("kind", PEFTS)
def test_peft_adds_the_same(kind: str, base: Base, unet: Any, tmp_path: Path) -> None:
    plain = {name: value.clone() for name, value in unet.state_dict().items()}
    model = shaken(get_peft_model(unet, PEFTS[kind]))
    model.save_pretrained(str(tmp_path))
    merged = model.merge_and_unload().state_dict()
    stacked = add(base, tmp_path)  # the folder, with adapter_config.json
    assert same(base, merged, plain) >= stacked.layers > 4


PATTERNS: list[tuple[dict[str, int], dict[str, int]]] = [
    ({r"down_blocks\..*attn1\.to_q": 12}, {}),
    ({"attn1.to_q": 12, r".*to_q": 3, LINEAR: 5}, {}),  # the first that matches
    ({r".*to_q": 3, "attn1.to_q": 12}, {r"attn2\.to_q": 2}),
    ({f"^{LINEAR}": 7, "o_q": 9, "attn1": 9}, {f"^{LINEAR}": 1}),  # "o_q", "attn1": no whole names
]


@pytest.mark.parametrize(("alphas", "ranks"), PATTERNS)
@pytest.mark.parametrize("rslora", [False, True])
def test_patterns_are_pefts(
    alphas: dict[str, int],
    ranks: dict[str, int],
    rslora: bool,
    base: Base,
    unet: Any,
    tmp_path: Path,
) -> None:
    """Let PEFT itself add what diffusers saved: the first key that matches a path gives alpha."""
    from diffusers import StableDiffusionPipeline
    from peft.utils import get_peft_model_state_dict

    patterns = {"alpha_pattern": alphas, "rank_pattern": ranks, "use_rslora": rslora}
    config = LoraConfig(r=4, lora_alpha=4, target_modules=["to_q", "to_k"], **patterns)
    plain = {name: value.clone() for name, value in unet.state_dict().items()}
    model = shaken(get_peft_model(unet, config))
    tensors = get_peft_model_state_dict(model)
    StableDiffusionPipeline.save_lora_weights(
        tmp_path,
        unet_lora_layers={k.removeprefix("base_model.model."): v for k, v in tensors.items()},
        unet_lora_adapter_metadata=config.to_dict(),
        weight_name="style.safetensors",
    )
    # diffusers sorts the keys of its metadata: restore the order that PEFT was given.
    file = tmp_path / "style.safetensors"
    told = {f"unet.{k}": v for k, v in config.to_dict().items() if k in (*patterns, "lora_alpha")}
    save_file(load_file(file), file, {lora_stack.ADAPTER: json.dumps(told)})
    add(base, file)
    assert same(base, model.merge_and_unload().state_dict(), plain) > 4


@pytest.mark.parametrize(("pattern", "says"), [("(a|aa)+(?<=5)", "timed out"), ("(", "missing")])
def test_a_pattern_that_never_ends_is_refused(
    pattern: str, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lora_stack, "SECONDS", 0.05)
    assert lora_stack._of_pattern({"a+": 3}, "a" * 5000, "x") == 3  # the control
    with pytest.raises(HdbError, match=says):
        lora_stack._of_pattern({pattern: 3}, "a" * 5000, "x")


def lycoris(kind: str, layer: nn.Module) -> tuple[dict[str, Tensor], Tensor, Tensor | None]:
    """Let LyCORIS make a change of a layer; return what it saves, and weight and bias after it.

    Its `merge_to` applies alpha / r twice to LoHa and LoKr, what it trains and draws with once.
    """
    options: dict[str, Any] = {"lora_dim": 4, "alpha": 2.0}
    name, *words = kind.split()
    options["use_tucker"] = "core" in words
    options["weight_decompose"] = "dora" in words
    options["wd_on_out"] = "columns" not in words
    options["decompose_both"] = "both" in words
    options["full_matrix"] = "full" in words
    kinds = {"locon": LoConModule, "loha": LohaModule, "lokr": LokrModule}
    kinds |= {"full": FullModule, "norm": NormModule}
    module = kinds[name]("x", layer, **options)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for value in module.parameters():
            if value.requires_grad:
                value.add_(torch.randn(value.shape, generator=generator) / 8)
    if name == "full":
        merged = layer.weight + module.weight, layer.bias + module.bias
        return {"diff": module.weight.data, "diff_b": module.bias.data}, *merged
    if name == "norm":
        return dict(module.state_dict()), *module.get_merged_weight()
    made = module.get_weight(module.shape) if name != "locon" else module.get_diff_weight()[0]
    weight = layer.weight + made.view_as(layer.weight)
    if "dora" in words:
        weight = weight_decompose(weight, module.dora_scale, wd_on_out=options["wd_on_out"])
    return dict(module.state_dict()), weight, layer.bias


KINDS = ["locon", "locon core", "locon dora", "locon dora columns", "loha", "loha core"]
KINDS += ["loha dora", "lokr", "lokr core", "lokr both", "lokr full", "lokr dora columns", "full"]


@pytest.mark.parametrize("kind", [*KINDS, "norm"])
@torch.no_grad()
def test_lycoris_adds_the_same(kind: str, base: Base, unet: Any, tmp_path: Path) -> None:
    paths = ["mid_block.resnets.0.norm1", LINEAR.replace("attn1.to_q", "norm1")]
    paths = paths if kind == "norm" else [CONV, LINEAR.replace("to_q", "to_out.0")]
    tensors, expected = {}, {}
    for path in paths:
        saved, weight, bias = lycoris(kind, unet.get_submodule(path))
        tensors |= {f"lora_unet_{path.replace('.', '_')}.{k}": v for k, v in saved.items()}
        expected |= {f"{path}.weight": weight, f"{path}.bias": bias}
    file = tmp_path / "style.safetensors"
    save_file({k: v.detach().clone().contiguous() for k, v in tensors.items()}, file)
    plain = {name: value.clone() for name, value in unet.state_dict().items()}
    assert add(base, file).layers == 2
    assert same(base, expected, plain) >= 2
    add(base, file, -1.0)
    if "dora" not in kind:  # whose change depends on the weight it meets
        assert same(base, plain, plain) == 0  # the control: strength is linear, 1 - 1 is nothing


@pytest.mark.parametrize(
    ("name", "family"),
    [
        ("base_model.model.{path}", "sd1"),
        ("{path}", "sd1"),
        ("unet.{path}", "sd1"),
        ("lora_unet.{path}", "sd1"),
        ("diffusion_model.{original}", "sd1"),
        ("model.diffusion_model.{original}", "sd1"),
        ("unet.{original}", "sdxl"),
        ("diffusion_model.{original}", "sdxl"),
        ("lora_unet_{flat original}", "sd1"),
        ("lycoris_{flat path}", "sd1"),
    ],
)
def test_names_of_a_layer_of_the_unet(name: str, family: str) -> None:
    path = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
    original = "input_blocks.4.1.transformer_blocks.0.attn1.to_q"
    words = {"path": path, "original": original}
    words |= {f"flat {k}": v.replace(".", "_") for k, v in words.items()}
    assert name.format(**words) in set(lora_stack._names(family, "unet", path))
    other = "down_blocks.1.attentions.1.transformer_blocks.0.attn1.to_q"
    assert name.format(**words) not in set(lora_stack._names(family, "unet", other))


@pytest.mark.parametrize(
    "name",
    [
        "text_encoder.text_model.{path}",
        "text_encoder.{path}",
        "base_model.model.text_model.{path}",
        "base_model.model.{path}",
        "text_encoders.clip_l.transformer.text_model.{path}",
        "clip_l.text_model.{path}",
        "lora_te_text_model_{flat}",
        "lora_te1_text_model_{flat}",
    ],
)
@pytest.mark.parametrize("now", ["", "text_model."])
def test_names_of_a_layer_of_the_text_encoder(name: str, now: str) -> None:
    path = "encoder.layers.0.self_attn.q_proj"
    names = set(lora_stack._names("sd1", "text_encoder", now + path))
    assert name.format(path=path, flat=path.replace(".", "_")) in names
    assert not any("clip_g" in each or "te2" in each for each in names)


def test_names_without_a_component_go_where_they_fit(tmp_path: Path) -> None:
    wide, narrow = nn.Linear(6, 5), nn.Linear(4, 3)
    before = [wide.weight.clone(), narrow.weight.clone()]
    lora = lora_stack.Lora(tmp_path / "x", 1.0, "", {}, {})
    parts = {"down": torch.ones(1, 4), "up": torch.ones(3, 1)}
    chosen = lora_stack._change(lora, lora_stack.Parts("x", "y", parts), [wide, narrow])
    assert chosen is narrow and torch.equal(wide.weight, before[0])
    torch.testing.assert_close(narrow.weight.data, before[1] + 1)


def test_peft_without_its_settings_is_told(base: Base, unet: Any, tmp_path: Path) -> None:
    plain = {name: value.clone() for name, value in unet.state_dict().items()}
    model = shaken(get_peft_model(unet, LoraConfig(r=4, lora_alpha=4, target_modules=["to_q"])))
    model.save_pretrained(str(tmp_path))
    (tmp_path / lora_stack.CONFIG).unlink()
    with pytest.warns(HdbWarning, match="alpha is taken to be the rank"):
        add(base, tmp_path / "adapter_model.safetensors")
    assert same(base, model.merge_and_unload().state_dict(), plain) > 4


@pytest.mark.parametrize("kind", ["pissa", "olora"])
def test_a_lora_that_began_from_the_base_is_named(
    kind: str, base: Base, unet: Any, tmp_path: Path
) -> None:
    """PEFT takes what it began from off the base's weights, so W + BA is not what it gives."""
    plain = unet.state_dict()[f"{LINEAR}.weight"].clone()
    settings = LoraConfig(r=4, lora_alpha=4, target_modules=[LINEAR], init_lora_weights=kind)
    model = shaken(get_peft_model(unet, settings))
    model.save_pretrained(str(tmp_path))
    a, b = load_file(tmp_path / "adapter_model.safetensors").values()
    merged = model.merge_and_unload().state_dict()[f"{LINEAR}.weight"]
    assert (plain + b @ a - merged).abs().max() > 1e-3  # what it would be taken for
    with pytest.raises(HdbError, match=rf"init_lora_weights '{kind}'.*convert it to a plain LoRA"):
        lora_stack.read(str(tmp_path))


STEM = "lora_unet_mid_block_resnets_0_conv1"


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ([f"{STEM}.{k}.weight" for k in ("a1", "a2", "b1", "b2")], "is a GLoRA"),
        ([f"{STEM}.oft_blocks", f"{STEM}.alpha"], "is an OFT or BOFT"),
        ([f"base_model.model.{CONV}.oft_R.weight"], "is an OFT or BOFT"),
        ([f"{STEM}.weight", f"{STEM}.on_input"], r"is an \(IA\)3"),
        ([f"base_model.model.{LINEAR}.lora_{k}" for k in "EAB"], "is an AdaLoRA"),
        ([f"base_model.model.{LINEAR}.vera_lambda_b"], "is a VeRA"),
        (["emb_params"], "is a textual inversion embedding"),
        (["lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight"], "was made for Flux"),
        (["transformer.joint_transformer_blocks.0.a.lora_A.weight"], "Stable Diffusion 3"),
    ],
)
def test_what_is_not_read_is_named(keys: list[str], says: str, base: Base, tmp_path: Path) -> None:
    file = tmp_path / "style.safetensors"
    save_file({key: torch.ones(4, 4) for key in keys}, file)
    with pytest.raises(HdbError, match=says) as caught:
        lora_stack.stack(base, [lora_stack.read(str(file))])
    assert "damaged" not in str(caught.value) and "another base" not in str(caught.value)


def test_another_family_is_named_by_its_text(base: Base, tmp_path: Path) -> None:
    file = tmp_path / "style.safetensors"
    stem = "lora_unet_down_blocks_9_attentions_0_transformer_blocks_0_attn2_to_k"
    save_file({f"{stem}.lora_down.weight": torch.ones(4, 2048)}, file)
    with pytest.raises(HdbError, match="it was made for Stable Diffusion XL"):
        lora_stack.stack(base, [lora_stack.read(str(file))])
