"""One LoRA, written with the keys of every tool, gives the weights that PEFT merges."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from commands import told
from cutdown import _unet as original_name
from peft import LoraConfig, get_peft_model
from peft.utils import get_peft_model_state_dict
from safetensors.torch import save_file
from torch import Tensor

from hdbcli.interop import lora_stack
from hdbcli.model.base import Base, open_base
from registry.checkpoints.ldm import canonical

if TYPE_CHECKING:
    from cutdown import Narrow

EXACT = 1e-6  # largest difference of a weight in float32
SHORT = {"unet": "unet", "text_encoder": "te1", "text_encoder_2": "te2"}
CLIP = {"text_encoder": "clip_l", "text_encoder_2": "clip_g"}
TARGETS = {
    "unet": ["to_q", "to_out.0", "conv1", "proj_in", "time_emb_proj"],
    "text_encoder": ["q_proj", "out_proj", "fc1"],
    "text_encoder_2": ["q_proj", "out_proj", "fc1"],
}
# What ends a key of the smaller and of the larger matrix.
KOHYA, PEFT = (".lora_down.weight", ".lora_up.weight"), (".lora_A.weight", ".lora_B.weight")
OLD, LINEAR = (
    tuple(f".{kind}.{side}.weight" for side in ("down", "up"))
    for kind in ("lora", "lora_linear_layer")
)
PROCESSOR = "_lora.down.weight", "_lora.up.weight"


def flat(path: str) -> str:
    return path.replace(".", "_")


def original(path: str) -> str:
    """Name a layer of the UNet as the original code does, by the tests' own table."""
    return original_name(f"{path}.weight", {"0", "1", "2", "3"}).removesuffix(".weight")


def processor(component: str, path: str) -> str | None:
    """Name an attention layer as diffusers did at first, with its attention processors."""
    if component != "unet" or not re.search(r"\.attn\d\.", path):
        return None
    return "unet." + path.removesuffix(".0").replace(".to_", ".processor.to_")


def of_unet(form: Callable[[str], str]) -> Callable[[str, str], str | None]:
    return lambda component, path: form(path) if component == "unet" else None


def comfy(component: str, path: str) -> str:
    if component == "unet":
        return f"diffusion_model.{original(path)}"
    return f"text_encoders.{CLIP[component]}.transformer.{path}"


# tool -> the name of a layer, None for one that it does not train, and what follows the name
LAYOUTS: dict[str, tuple[Callable[[str, str], str | None], tuple[str, ...]]] = {
    "kohya": (lambda c, path: f"lora_{SHORT[c]}_{flat(path)}", KOHYA),
    "kohya, original names": (of_unet(lambda path: f"lora_unet_{flat(original(path))}"), KOHYA),
    "LyCORIS": (of_unet(lambda path: f"lycoris_{flat(path)}"), KOHYA),
    "diffusers": (lambda c, path: f"{c}.{path}", PEFT),
    "diffusers, before PEFT": (lambda c, path: f"{c}.{path}", OLD),
    "diffusers, at first": (processor, PROCESSOR),
    "diffusers, text at first": (lambda c, path: f"{c}.{path}" if c != "unet" else None, LINEAR),
    "PEFT": (of_unet(lambda path: f"base_model.model.{path}"), PEFT),
    "PEFT, bare": (of_unet(lambda path: path), PEFT),
    "ComfyUI": (comfy, KOHYA),
    "ComfyUI, whole model": (of_unet(lambda path: f"model.{comfy('unet', path)}"), PEFT),
    "OneTrainer": (lambda c, path: f"lora_{SHORT[c]}.{path}", KOHYA),
}


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_every_tools_keys_give_what_peft_merges(
    family: str, narrow: Narrow, hdb_home: Path, tmp_path: Path
) -> None:
    told("base", "add", "mine", narrow.folder(family))
    base = open_base("mine", "cpu")
    plain = {name: value.clone() for name, value in everything(base).items()}
    factors, merged = peft(narrow.folder(family))
    assert merged.keys() <= plain.keys()
    for tool, (form, (down, up)) in LAYOUTS.items():
        tensors, changed = {}, set()
        for (component, path), (a, b) in factors.items():
            stem = form(component, path)
            if stem is None:
                continue
            if down == KOHYA[0]:  # alpha over the rank halves what is twice as large
                tensors[f"{stem}.alpha"], b = torch.tensor(len(a) / 2), 2 * b
            tensors |= {f"{stem}{down}": a, f"{stem}{up}": b}
            changed.add(f"{component}.{path}.weight")
        file = tmp_path / "style.safetensors"
        save_file({key: value.contiguous() for key, value in tensors.items()}, file)
        (stacked,) = lora_stack.stack(base, [lora_stack.read(str(file))])
        assert not stacked.unread and stacked.layers == len(changed) > 2, tool
        for name, value in everything(base).items():
            expected = merged[name] if name in changed else plain[name]
            assert (value - expected).abs().max() < EXACT, (tool, name)
            if name in changed:
                assert (value - plain[name]).abs().max() > 1e-4, (tool, name)  # the control
            value.copy_(plain[name])


def everything(base: Base) -> dict[str, Tensor]:
    return {
        named(component, name.replace(".base.", ".")): value.data
        for component, module in base.backbone.components.items()
        for name, value in module.named_parameters()
    }


def named(component: str, path: str) -> str:
    return f"{component}.{canonical(component, path)}"


def peft(folder: Path) -> tuple[dict[tuple[str, str], tuple[Tensor, Tensor]], Any]:
    """Let PEFT adapt a checkpoint; return down and up of each layer, and the weights it merges."""
    from diffusers import UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    kinds: dict[str, Any] = {"unet": UNet2DConditionModel, "text_encoder": CLIPTextModel}
    kinds["text_encoder_2"] = CLIPTextModelWithProjection
    factors, merged = {}, {}
    generator = torch.Generator().manual_seed(0)
    for component, targets in TARGETS.items():
        if not (folder / component).is_dir():
            continue
        module = kinds[component].from_pretrained(folder / component, torch_dtype=torch.float32)
        model = get_peft_model(module, LoraConfig(r=4, lora_alpha=4, target_modules=targets))
        with torch.no_grad():
            for name, value in model.named_parameters():
                if "lora_" in name:
                    value.copy_(torch.randn(value.shape, generator=generator) / 8)
        said = get_peft_model_state_dict(model)
        for key, a in said.items():
            if key.endswith(PEFT[0]):
                path = key.removeprefix("base_model.model.").removesuffix(PEFT[0])
                b = said[key.replace(*PEFT)].clone()
                factors[component, canonical(component, path)] = (a.clone(), b)
        whole = model.merge_and_unload().state_dict()
        merged |= {named(component, name): value for name, value in whole.items()}
    return factors, merged
