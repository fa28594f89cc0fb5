"""Recognise the family of a checkpoint by its layout, and refuse what hdb could not work on."""

from __future__ import annotations

import re
import warnings
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

from registry.checkpoints.contents import Checkpoint, read_config
from registry.checkpoints.ldm import LAYOUTS
from registry.checkpoints.lora_formats import architecture, other_adapter
from registry.checkpoints.safetensors import TensorInfo
from registry.errors import HdbError, HdbWarning, UsageError
from registry.stable_diffusion.families import ATTENTION, FAMILIES, PER_BLOCK, PER_LAYER, Family
from registry.stable_diffusion.few_steps import few_steps

Tensors = Mapping[str, TensorInfo]

# Tensor names of diffusers and of the original files alike.
BLOCK = re.compile(r".*\.attn2\.to_k\.weight")
LAYER = re.compile(r".*\.(?:layers|resblocks)\.(\d+)\.(?:self_attn\.q_proj\.|attn\.in_proj_)weight")
UNET_TARGET = re.compile(rf"({'|'.join(ATTENTION)})\.weight")
TEXT_TARGET = re.compile(
    r".*\.(self_attn\.[qkv]_proj\.|(self_)?attn\.out_proj\.|attn\.in_proj_)weight"
)
INPUT = ("conv_in.weight", "input_blocks.0.0.weight")
DECODER = "decoder.conv_out.weight"
WEIGHT_DTYPES = {"F16", "BF16", "F32"}
PREDICTIONS = {"v": "v_prediction", "v_prediction": "v_prediction", "epsilon": "epsilon"}

# What else a single file may be: a part of its tensors' names.
OTHERS = {
    "lora_": "a LoRA",
    "control_model.": "a ControlNet",
    "controlnet_cond_embedding.": "a ControlNet",
    "adapter.body.": "a T2I-Adapter",
    "time_stack.": "Stable Video Diffusion",
    "motion_modules.": "an AnimateDiff motion module",
}

# One component alone: a part of its tensors' names.
ALONE = {
    "input_blocks.0.0.weight": "UNet",
    "down_blocks.0.resnets.": "UNet",
    "decoder.conv_out.weight": "autoencoder",
    "text_model.encoder.layers.": "text encoder",
    "transformer.resblocks.": "text encoder",
}

# What a UNet reads besides latents and text: a part of a tensor's name, in the original names and
# in those of diffusers -> what kind of model that is, and what to give instead.
_LCM = (
    "is a distilled LCM, whose UNet reads how strong guidance is to be",
    "give the model that it was distilled from, and add its LCM LoRA: hdb gen --lora",
)
_UNCLIP = (
    "is an unCLIP model, whose UNet reads an embedding of a picture",
    "give the Stable Diffusion that draws from text alone",
)
_GLIGEN = ("is a GLIGEN, whose UNet reads boxes", _UNCLIP[1])
FURTHER_INPUTS = {
    "time_embed.cond_proj.": _LCM,
    "time_embedding.cond_proj.": _LCM,
    "class_embedding.": _UNCLIP,
    "position_net.": _GLIGEN,
}


@dataclass(frozen=True)
class Anatomy:
    """What tells families apart: transformer blocks of the UNet, layers of each text encoder."""

    blocks: int
    layers: Mapping[str, int]

    def far(self, family: Family) -> int:
        """Return how many blocks and layers differ."""
        names = {*self.layers, *family.layers}
        text = sum(abs(self.layers.get(n, 0) - family.layers.get(n, 0)) for n in names)
        return abs(self.blocks - family.blocks) + text


def recognise(checkpoint: Checkpoint) -> Family:
    """Return the family; HdbError for another architecture or a checkpoint not fit for use."""
    _check_alone(checkpoint)
    found = _anatomy(checkpoint.components)
    nearest = min(FAMILIES.values(), key=found.far)
    needed = {"unet", "vae", *nearest.layers}
    missing = sorted(needed - set(checkpoint.components))
    if missing and found.blocks == nearest.blocks:
        raise HdbError(
            f"{checkpoint.path} lacks {', '.join(missing)}, which {nearest.title} needs; download "
            "the model in full"
        )
    if found.far(nearest):
        raise HdbError(_unknown(checkpoint, found, nearest))
    _check_whole(checkpoint, nearest)
    _check_input(checkpoint, nearest)
    _check_dtypes(checkpoint)
    return nearest


def resolution_of(configs: Path) -> int:
    """Return the pixels a diffusers configuration is made for; HdbError if it does not say."""
    side = read_config(configs / "unet" / "config.json").get("sample_size")
    steps = read_config(configs / "vae" / "config.json").get("block_out_channels")
    if type(side) is not int or side < 1 or not isinstance(steps, list) or not steps:
        raise HdbError(
            f"{configs} does not say its resolution: sample_size of the UNet is {side!r}, "
            f"block_out_channels of the VAE {steps!r}; complete its config.json"
        )
    return side * 2 ** (len(steps) - 1)


def prediction_of(checkpoint: Checkpoint, family: Family, asked: str | None) -> str:
    """Return what the UNet predicts, epsilon or v_prediction, which its weights do not show.

    A folder says it. A single file may; else it is what was asked for, or usual in the family.
    """
    if asked is not None and asked not in PREDICTIONS:
        raise UsageError(f"unknown prediction {asked!r}; choose epsilon or v")
    folder = family.configs() if checkpoint.single else checkpoint.path
    config = read_config(folder / "scheduler" / "scheduler_config.json")
    told = str(config.get("prediction_type", "epsilon"))
    if checkpoint.single:
        told = asked or _said(checkpoint, family) or _assumed(checkpoint, family, told)
    if told not in PREDICTIONS or "beta_start" not in config:
        raise HdbError(
            f"{checkpoint.path} is trained to predict {told!r} on the schedule of "
            f"{config.get('_class_name')!r}; hdb knows epsilon and v_prediction on that of DDPM"
        )
    if asked and PREDICTIONS[asked] != PREDICTIONS[told]:
        raise HdbError(
            f"{checkpoint.path} says that it predicts {told}, not {asked}; drop --prediction or "
            "put its scheduler_config.json right"
        )
    return PREDICTIONS[told]


def _said(checkpoint: Checkpoint, family: Family) -> str | None:
    """Return what a single file says of itself: explicitly, by its architecture's name, or by
    the name of a model of few steps, all of which predict noise."""
    told = checkpoint.metadata.get("modelspec.prediction_type")
    if told or not family.variants:
        return told
    layout = LAYOUTS[family.name]
    architecture = checkpoint.metadata.get("modelspec.architecture")
    if architecture in (layout.architecture, layout.epsilon):
        return "epsilon" if architecture == layout.epsilon else "v_prediction"
    return "epsilon" if few_steps(name_of(checkpoint)) else None


def _assumed(checkpoint: Checkpoint, family: Family, usual: str) -> str:
    """Return what most models of the family predict; where both are common, say so and what to do
    if that is wrong."""
    if family.variants:
        other = next(short for short in ("epsilon", "v") if PREDICTIONS[short] != usual)
        pixels = {p: resolution_of(family.configs(p)) for p in PREDICTIONS.values()}
        warnings.warn(
            f"{checkpoint.path.name} does not say what it predicts; {usual} at {pixels[usual]} px "
            f"was assumed. If it draws noise, take {PREDICTIONS[other]} at "
            f"{pixels[PREDICTIONS[other]]} px: hdb base rm NAME, then hdb base add with "
            f"--prediction {other}",
            HdbWarning,
            stacklevel=3,
        )
    return usual


def name_of(checkpoint: Checkpoint) -> str:
    """Return by what names a checkpoint goes: its file's or folder's, and its title."""
    return f"{checkpoint.path.stem} {checkpoint.metadata.get('modelspec.title', '')}"


def _anatomy(components: Mapping[str, Tensors]) -> Anatomy:
    blocks = sum(bool(BLOCK.fullmatch(name)) for name in components.get("unet", ()))
    layers = {
        component: len({m.group(1) for m in map(LAYER.fullmatch, tensors) if m})
        for component, tensors in components.items()
        if component.startswith("text_encoder")
    }
    return Anatomy(blocks, layers)


def _check_alone(checkpoint: Checkpoint) -> None:
    """Raise HdbError for a file that is one component of a pipeline, and name it."""
    if not checkpoint.single or set(checkpoint.components) - {"", "unet"}:
        return
    (tensors,) = checkpoint.components.values()
    if _other(tensors):  # a LoRA has the names of a UNet too
        return
    for sign, component in ALONE.items():
        if any(sign in name for name in tensors):
            blocks = sum(bool(BLOCK.fullmatch(name)) for name in tensors)
            alike = [f.title for f in FAMILIES.values() if f.blocks == blocks]
            kind = f", as of {' or '.join(alike)}" if component == "UNet" and alike else ""
            raise HdbError(
                f"{checkpoint.path} holds {'an' if component[0] in 'aeiou' else 'a'} {component} "
                f"alone{kind}; hdb needs UNet, text encoder and autoencoder: give a checkpoint "
                "that has them all, or a diffusers folder with this one in its place"
            )


def _other(names: Collection[str]) -> str:
    """Return what else a single file is, empty if that is not known."""
    signs = (what for sign, what in OTHERS.items() if any(sign in name for name in names))
    adapter, _ = other_adapter(names) or ("", "")
    return next(signs, "") or adapter or architecture(names) or ""


def _unknown(checkpoint: Checkpoint, found: Anatomy, nearest: Family) -> str:
    names = [name for tensors in checkpoint.components.values() for name in tensors]
    refiner = (
        "the refiner of Stable Diffusion XL" if list(found.layers) == ["text_encoder_2"] else ""
    )
    called = repr(checkpoint.called) if checkpoint.called else refiner or _other(names)
    return (
        f"{checkpoint.path} is no Stable Diffusion that hdb knows"
        f"{f', but {called}' if called else ''}: {_count(found.blocks, found.layers)}; the nearest "
        f"is {nearest.title}: {_count(nearest.blocks, nearest.layers)}; give a model of "
        f"{', '.join(family.title for family in FAMILIES.values())}"
    )


def _count(blocks: int, layers: Mapping[str, int]) -> str:
    text = " and ".join(str(count) for count in layers.values()) or "no"
    return f"{blocks} transformer blocks, {text} text layers"


def _check_whole(checkpoint: Checkpoint, family: Family) -> None:
    """Raise HdbError where a block, a layer or the autoencoder is there in part only."""
    parts = {"unet": (len(_targets(checkpoint, "unet")), PER_BLOCK * family.blocks)}
    for component, layers in family.layers.items():
        targets = _targets(checkpoint, component)
        joined = any(name.endswith("in_proj_weight") for name in targets)  # q, k and v in one
        parts[component] = len(targets), layers * (2 if joined else PER_LAYER)
    parts["vae"] = int(DECODER in checkpoint.components["vae"]), 1
    for component, (there, needed) in parts.items():
        if there != needed:
            raise HdbError(
                f"{checkpoint.path} holds {component} in part only: {there} of {needed} tensors "
                "that hdb looks for; download the model in full"
            )


def _check_input(checkpoint: Checkpoint, family: Family) -> None:
    """Raise HdbError for a UNet that is fed with more than latents and these text encoders."""
    unet = checkpoint.components["unet"]
    further = FURTHER_INPUTS | ({} if family.double else {"label_emb.": _UNCLIP})
    for sign, (what, instead) in further.items():
        if any(name.startswith(sign) for name in unet):
            raise HdbError(f"{checkpoint.path} {what} ({sign[:-1]}); {instead}")
    shape = next((unet[name].shape for name in INPUT if name in unet), ())
    if len(shape) != 4 or shape[1] != 4:
        kind = ", as of an inpainting model" if shape[1:2] == (9,) else ""
        raise HdbError(
            f"the UNet of {checkpoint.path} has {shape[1] if len(shape) > 1 else 'no'} input "
            f"channels{kind}, hdb needs 4; give the model that draws from text alone"
        )
    context = {info.shape[-1] for name, info in unet.items() if BLOCK.fullmatch(name)}
    widths = sum(
        info.shape[-1]
        for component in family.layers
        for name, info in checkpoint.components[component].items()
        if name.endswith("token_embedding.weight")
    )
    if context != {widths}:
        raise HdbError(
            f"the UNet of {checkpoint.path} reads text of width {sorted(context)}, its text "
            f"encoders write {widths}; they do not belong together, download the model again"
        )


def _check_dtypes(checkpoint: Checkpoint) -> None:
    """Raise HdbError unless the targets of each component are in one usual float format."""
    for component in checkpoint.components:
        dtypes = {info.dtype for info in _targets(checkpoint, component).values()}
        if len(dtypes) > 1 or dtypes - WEIGHT_DTYPES:
            raise HdbError(
                f"the {component} of {checkpoint.path} is stored as {' and '.join(sorted(dtypes))}"
                "; hdb needs one of F16, BF16, F32 throughout: convert it"
            )


def _targets(checkpoint: Checkpoint, component: str) -> dict[str, TensorInfo]:
    pattern = UNET_TARGET if component == "unet" else TEXT_TARGET
    tensors = checkpoint.components.get(component, {})
    return {name: info for name, info in tensors.items() if pattern.fullmatch(name)}
