"""Replay what other tools do with the keys of a LoRA file, and count the targets they would change.

ComfyUI, A1111 (Forge alike) and InvokeAI are asked by their rules: how each reads a key, and which
layer of its own network it then finds. diffusers is not replayed, it loads the file for real
(`hdbcli.interop.diffusers_reader`). No reader says loudly what it did not load, so this is where
it shows.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hdbcli.method.lidb import LiDBLayer
from hdbcli.model.base import Base
from registry.checkpoints.ldm import canonical, original_layer, unet_name

# Transformer blocks at each level of a UNet in Stable Diffusion's layout; two layers a level.
DEPTHS = {"Stable Diffusion 1.x or 2.x": (1, 1, 1, 0), "Stable Diffusion XL": (0, 2, 10)}
WIDTHS = {768: "Stable Diffusion 1.x", 1024: "Stable Diffusion 2.x", 2048: "Stable Diffusion XL"}
# What follows the name of a layer -> which part it is.
KOHYA = {".lora_down.weight": "down", ".lora_up.weight": "up", ".alpha": "alpha"}
COMFY = KOHYA | {"_lora.down.weight": "down", "_lora.up.weight": "up"}
COMFY |= {".lora_A.weight": "down", ".lora_B.weight": "up"}

Locate = Callable[[str], tuple[str, str] | None]  # a key of the file -> (target, part), if any


@dataclass(frozen=True)
class Reading:
    """What one reader makes of a file; `asked` is False where it knows no such base."""

    reader: str
    mapped: int  # targets changed by exactly up @ down
    total: int
    lost: tuple[str, ...] = ()  # targets that would stay as they are, or change wrongly
    unread: tuple[str, ...] = ()  # keys, or layers, that are none of the targets'
    problem: str | None = None
    asked: bool = True

    @property
    def ok(self) -> bool:
        """Say whether every target maps and nothing is left over."""
        return self.asked and self.mapped == self.total and not self.unread


def replay(base: Base, tensors: Mapping[str, Tensor]) -> list[Reading]:
    """Return what the readers that are asked by their rules make of a file."""
    return [rule(base, tensors) for rule in (comfyui, a1111, invokeai)]


def comfyui(base: Base, tensors: Mapping[str, Tensor]) -> Reading:
    """ComfyUI lists the names it knows, from its own UNet's layout, and looks for each in the file.

    Of diffusers' names it knows those of old: `attn1.processor.to_q`, never `attn1.to_q`.
    """
    layout = layout_of(base)
    if layout is None:
        return _unknown(base, "ComfyUI", _no_layout(base))
    known: dict[str, str] = {}
    for target in base.injected.layers:
        component, _, path = target.partition(".")
        if component == "unet":
            original = _ldm_path(path, layout)
            if original:
                own, old = f"lora_unet_{_flat(original)}", attention_of_old(path)
                names = (f"lora_unet_{_flat(path)}", own, f"unet.{old}", old)
                known |= dict.fromkeys(names, target)
        else:
            shorts = ("te2",) if component == "text_encoder_2" else ("te", "te1")
            known |= {f"lora_{short}_{_flat(path)}": target for short in shorts}
            known[f"{component}.{path}"] = target

    def locate(key: str) -> tuple[str, str] | None:
        for suffix, part in COMFY.items():
            name = key.removesuffix(suffix)
            if name != key and name in known:
                return known[name], part
        return None

    return _count("ComfyUI", base, tensors, locate)


def a1111(base: Base, tensors: Mapping[str, Tensor]) -> Reading:
    """A1111 cuts a key at its first dot and rewrites what is before it to the name of a layer of
    the original network."""
    layout = layout_of(base)
    if layout is None:
        return _unknown(base, "A1111/Forge", _no_layout(base))
    second = context_width(base) == 1024
    layers = {}
    for target in base.injected.layers:
        component, _, path = target.partition(".")
        layers[_ldm_name(component, path, layout, second)] = target

    def locate(key: str) -> tuple[str, str] | None:
        stem, dot, rest = key.partition(".")
        target = layers.get(_compvis(stem, second))
        target = target or layers.get(stem.replace("lora_unet", "diffusion_model"))
        part = KOHYA.get(dot + rest)
        return (target, part) if target and part else None

    return _count("A1111/Forge", base, tensors, locate)


def invokeai(base: Base, tensors: Mapping[str, Tensor]) -> Reading:
    """InvokeAI knows the base by the width of the first cross-attention, and finds a layer by
    walking the diffusers modules along the underscores of its name."""
    widths = (t.shape[1] for k, t in tensors.items() if k.endswith("attn2_to_k.lora_down.weight"))
    width = next(widths, context_width(base))
    if width not in WIDTHS:
        known = ", ".join(map(str, WIDTHS))
        return _unknown(base, "InvokeAI", f"its text is {width} wide, {known} are known")
    paths = {
        component: {canonical(component, path) for path, _ in module.named_modules()} - {""}
        for component, module in base.backbone.components.items()
    }
    for component in paths.keys() - {"unet"}:  # it keeps CLIP's names of old
        paths[component].add("text_model")
    short = "te1" if "text_encoder_2" in paths else "te"
    components = {"lora_unet_": "unet", f"lora_{short}_": "text_encoder"}
    components |= {"lora_te2_": "text_encoder_2"} if short == "te1" else {}

    xl = DEPTHS["Stable Diffusion XL"]
    renamed = {
        f"lora_unet_{_flat(original)}": f"lora_unet_{_flat(path)}"
        for path in (paths["unet"] if width == 2048 else ())
        if (original := _ldm_path(path, xl))
    }

    def locate(key: str) -> tuple[str, str] | None:
        stem, dot, rest = key.partition(".")
        stem = renamed.get(stem, stem)
        for prefix, component in components.items():
            path = _walk(paths[component], stem.removeprefix(prefix))
            target = f"{component}.{path}"
            if stem.startswith(prefix) and target in base.injected.layers and dot + rest in KOHYA:
                return target, KOHYA[dot + rest]
        return None

    return _count("InvokeAI", base, tensors, locate)


def attention_of_old(path: str) -> str:
    """Name a layer of the UNet as the first diffusers did: `attn1.processor.to_q`."""
    return re.sub(r"\.to_out\.0$", ".to_out", path).replace(".to_", ".processor.to_")


def layout_of(base: Base) -> tuple[int, ...] | None:
    """Return the depths of the base's UNet if the original code has such a network, else None."""
    unet = base.backbone.components.get("unet")
    paths = [] if unet is None else [path for path, _ in unet.named_modules()]
    found = {path.removesuffix(".attn1") for path in paths if path.endswith(".attn1")}
    return next((d for d in DEPTHS.values() if found == set(ldm_blocks(d))), None)


def ldm_blocks(depths: Sequence[int]) -> dict[str, str]:
    """Map each transformer block of a UNet from diffusers' path to the original network's."""
    stacks = {"mid_block.attentions.0": max(depths)}
    for level, depth in enumerate(depths):
        up = len(depths) - 1 - level
        stacks |= {f"down_blocks.{level}.attentions.{i}": depth for i in range(2)}
        stacks |= {f"up_blocks.{up}.attentions.{i}": depth for i in range(3)}
    paths = [f"{s}.transformer_blocks.{t}" for s, depth in stacks.items() for t in range(depth)]
    return {path: unet_name(path) for path in paths}


def context_width(base: Base) -> int | None:
    """Return the width of the text that cross-attention reads, None where it is not a target."""
    widths = (m for name, (_, m) in base.injected.shapes.items() if name.endswith("attn2.to_k"))
    return next(widths, None)


def _count(reader: str, base: Base, tensors: Mapping[str, Tensor], locate: Locate) -> Reading:
    """Count the targets that get both factors, of the right shapes, at a scale of 1."""
    parts: dict[str, dict[str, Tensor]] = {}
    unread = []
    for key, tensor in tensors.items():
        found = locate(key)
        if found is None or found[1] in parts.setdefault(found[0], {}):  # none's, or a second time
            unread.append(key)
        else:
            parts[found[0]][found[1]] = tensor
    layers = base.injected.layers
    lost = [name for name, layer in layers.items() if not _exact(parts.get(name, {}), layer)]
    return Reading(reader, len(layers) - len(lost), len(layers), tuple(lost), tuple(unread))


def _exact(parts: Mapping[str, Tensor], layer: LiDBLayer) -> bool:
    """Say whether a layer is changed by up @ down: a missing alpha is a scale of 1, as alpha =
    rank is."""
    if "up" not in parts or "down" not in parts:
        return False
    rank, (n, m) = len(parts["down"]), layer.shape
    with torch.device("meta"):
        down, up = layer.as_weights(torch.empty(rank, m), torch.empty(n, rank))
    fits = parts["up"].shape == up.shape and parts["down"].shape == down.shape
    alpha = parts.get("alpha")
    return fits and (alpha is None or (alpha.numel() == 1 and alpha.item() == rank))


_RESNET: dict[str, str] = {
    "conv1": "in_layers_2",
    "conv2": "out_layers_3",
    "norm1": "in_layers_0",
    "norm2": "out_layers_0",
    "time_emb_proj": "emb_layers_1",
    "conv_shortcut": "skip_connection",
}
# How A1111 rewrites a name; the text encoder of 2.x is OpenCLIP's, which has other names.
_REWRITES: tuple[tuple[str, Callable[[re.Match[str]], str]], ...] = (
    (
        r"lora_unet_down_blocks_(\d+)_(attentions|resnets)_(\d+)_(.+)",
        lambda m: _compvis_block("input", 1 + 3 * int(m[1]) + int(m[3]), m[2], m[4]),
    ),
    (
        r"lora_unet_mid_block_(attentions|resnets)_(\d+)_(.+)",
        lambda m: (
            "diffusion_model_middle_block_"
            + (
                f"1_{m[3]}"
                if m[1] == "attentions"
                else f"{2 * int(m[2])}_{_RESNET.get(m[3], m[3])}"
            )
        ),
    ),
    (
        r"lora_unet_up_blocks_(\d+)_(attentions|resnets)_(\d+)_(.+)",
        lambda m: _compvis_block("output", 3 * int(m[1]) + int(m[3]), m[2], m[4]),
    ),
    (
        r"lora_unet_down_blocks_(\d+)_downsamplers_0_conv",
        lambda m: f"diffusion_model_input_blocks_{3 + 3 * int(m[1])}_0_op",
    ),
    (  # right for Stable Diffusion 1 and 2, whose first level on the way up has no attention
        r"lora_unet_up_blocks_(\d+)_upsamplers_0_conv",
        lambda m: f"diffusion_model_output_blocks_{2 + 3 * int(m[1])}_{1 + (m[1] != '0')}_conv",
    ),
    (r"lora_te1_(text_model_.+)", lambda m: f"0_transformer_{m[1]}"),
    (
        r"lora_te2_text_model_encoder_layers_(\d+)_(.+)",
        lambda m: f"1_model_transformer_resblocks_{m[1]}_{m[2].replace('self_attn', 'attn')}",
    ),
)


def _compvis_block(side: str, number: int, kind: str, rest: str) -> str:
    inner = f"1_{rest}" if kind == "attentions" else f"0_{_RESNET.get(rest, rest)}"
    return f"diffusion_model_{side}_blocks_{number}_{inner}"


def _compvis(stem: str, second: bool) -> str:
    """Rewrite what is before a key's first dot as A1111 does."""
    text = re.fullmatch(r"lora_te_text_model_encoder_layers_(\d+)_(.+)", stem)
    if text and second:
        return f"model_transformer_resblocks_{text[1]}_{text[2].replace('self_attn', 'attn')}"
    if text:
        return f"transformer_text_model_encoder_layers_{text[1]}_{text[2]}"
    for pattern, rewrite in _REWRITES:
        match = re.fullmatch(pattern, stem)
        if match:
            return rewrite(match)
    return stem


def _ldm_name(component: str, path: str, layout: Sequence[int], second: bool) -> str:
    """Name a target as the original network does, flattened."""
    if component == "unet":
        return f"diffusion_model_{_flat(_ldm_path(path, layout) or path)}"
    place = {"text_encoder": "0_", "text_encoder_2": "1_"}[component] if max(layout) > 1 else ""
    if second or component == "text_encoder_2":
        path = path.removeprefix("text_model.encoder.layers.").replace("self_attn", "attn")
        return f"{place}model_transformer_resblocks_{_flat(path)}"
    return f"{place}transformer_{_flat(path)}"


def _ldm_path(path: str, layout: Sequence[int]) -> str | None:
    """Name a target of the UNet as the original network of that layout does, None where it
    has none."""
    block = re.match(r".*\.transformer_blocks\.\d+", path)
    if block and block[0] not in ldm_blocks(layout):
        return None
    return original_layer("sdxl" if max(layout) > 1 else "sd1", path)


def _walk(paths: set[str], flat: str) -> str | None:
    """Follow a flattened name down the modules, taking the shortest name that exists each time."""
    at = name = ""
    for word in flat.split("_"):
        name = f"{name}_{word}" if name else word
        path = f"{at}.{name}" if at else name
        if path in paths:
            at, name = path, ""
    return at if not name else None


def _flat(path: str) -> str:
    return path.replace(".", "_")


def _no_layout(base: Base) -> str:
    return f"{base.spec.name} has no layout of {' or '.join(DEPTHS)}"


def _unknown(base: Base, reader: str, why: str) -> Reading:
    problem = f"knows no such base: {why}"
    return Reading(reader, 0, len(base.injected.layers), problem=problem, asked=False)
