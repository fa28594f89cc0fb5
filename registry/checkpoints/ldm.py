"""The names of the original Stable Diffusion checkpoints, one file for all components ("LDM").

A1111, Forge and ComfyUI load this layout; diffusers splits it into folders and renames every
tensor. Both directions are here: where a single file keeps a layer of the diffusers layout, and how
a diffusers folder is written as a single file; and at the end what other tools make of the names.
Names of text encoders carry `text_model.`.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from registry.errors import HdbError

UNET = "model.diffusion_model."
VAE = "first_stage_model."
SIDES = ("down", "up")
_FUSED = re.compile(r"transformer\.resblocks\.(\d+)\.attn\.in_proj_weight")
_OPEN_CLIP = re.compile(r"transformer\.resblocks\.(\d+)\.attn\.out_proj\.weight")


@dataclass(frozen=True)
class TextLayout:
    """Where a family's single file keeps one text encoder, and in whose names."""

    prefix: str
    open_clip: bool
    layers: int | None = None  # SD 2 stops before OpenCLIP's last layer, which the file still has


@dataclass(frozen=True)
class Layout:
    """What a family's single file holds beside the UNet and the autoencoder."""

    architecture: str  # as ModelSpec names it
    version: str  # as kohya's trainer names it
    text: Mapping[str, TextLayout]
    plain_up_levels: int = 1  # levels of the UNet's way up without attention, from the first
    epsilon: str | None = None  # the architecture that predicts noise, where that is not the usual


LAYOUTS = {
    "sd1": Layout(
        "stable-diffusion-v1",
        "sd_v1",
        {"text_encoder": TextLayout("cond_stage_model.transformer.", False)},
    ),
    "sd2": Layout(
        "stable-diffusion-v2-768-v",
        "sd_v2",
        {"text_encoder": TextLayout("cond_stage_model.model.", True, 23)},
        epsilon="stable-diffusion-v2-512",
    ),
    "sdxl": Layout(
        "stable-diffusion-xl-v1-base",
        "sdxl_base_v1-0",
        {
            "text_encoder": TextLayout("conditioner.embedders.0.transformer.", False),
            "text_encoder_2": TextLayout("conditioner.embedders.1.model.", True),
        },
        plain_up_levels=0,
    ),
}


def canonical(component: str, path: str) -> str:
    """Name a module so that the name lasts: newer transformers dropped `text_model.` from
    CLIP's paths."""
    own = path.startswith(("text_model.", "text_projection"))
    if component.startswith("text_encoder") and not own:
        return f"text_model.{path}"
    return path


def architecture_of(family: str, prediction: str | None) -> str:
    """Name what a model is as ModelSpec does; by its family where ModelSpec has no name."""
    if family not in LAYOUTS:
        return family
    layout = LAYOUTS[family]
    return layout.epsilon if layout.epsilon and prediction == "epsilon" else layout.architecture


def layout_of(family: str) -> Layout:
    """Return a family's layout; HdbError if it has none."""
    if family not in LAYOUTS:
        raise HdbError(
            f"family {family} has no single-file layout ({', '.join(LAYOUTS)} have); "
            "write a diffusers folder instead"
        )
    return LAYOUTS[family]


@dataclass(frozen=True)
class Place:
    """Where a tensor of the diffusers layout lies in a single file: third `part` of a fused one."""

    component: str
    path: str  # of the module
    part: int = 0
    parts: int = 1


def layers_of(key: str, layout: Layout) -> list[Place]:
    """Return the layers whose weights a tensor of a single file is: those in the UNet's blocks, and
    in the attention of text encoders.

    None for all others, three for a fused q, k, v.
    """
    if key.startswith(UNET) and key.endswith(".weight"):
        own = key[len(UNET) : -len("weight")]
        for name, path in _paths(layout.plain_up_levels).items():
            if own.startswith(name):
                return [Place("unet", f"{path}{own[len(name) :]}".removesuffix("."))]
        return []
    for component, text in layout.text.items():
        if key.startswith(text.prefix):
            return _text_layers(component, text, key[len(text.prefix) :])
    return []


@functools.cache
def _paths(plain_up_levels: int) -> dict[str, str]:
    """Turn `_unet` round: map the original names of layers in the UNet's blocks, and what those in
    transformers begin with, to diffusers'."""
    found: dict[str, str] = {}
    for block in (*(f"{side}_blocks.{level}" for level in range(4) for side in SIDES), "mid_block"):
        parts = {"resnets": (*_RESNET,), "attentions": ("",)}
        if block != "mid_block":  # samplers first: they lie where attention could
            parts = {f"{block.partition('_')[0]}samplers": ("conv.",), **parts}
        for kind, inner in parts.items():
            for path in (f"{block}.{kind}.{index}.{name}" for index in range(3) for name in inner):
                found.setdefault(_unet(path, plain_up_levels), path)
    return found


def _text_layers(component: str, text: TextLayout, key: str) -> list[Place]:
    if not text.open_clip:
        path, _, kind = key.rpartition(".")
        return [Place(component, path)] if kind == "weight" else []
    fused, out = _FUSED.fullmatch(key), _OPEN_CLIP.fullmatch(key)
    match = fused or out
    if not match or (text.layers is not None and int(match[1]) >= text.layers):
        return []
    attention = f"text_model.encoder.layers.{match[1]}.self_attn"
    if out:
        return [Place(component, f"{attention}.out_proj")]
    return [
        Place(component, f"{attention}.{kind}_proj", part, 3) for part, kind in enumerate("qkv")
    ]


@dataclass(frozen=True)
class Renamed:
    """The place of a diffusers tensor in a single file."""

    key: str
    part: int = 0
    parts: int = 1
    conv: bool = False  # a linear weight (n, m) that the file keeps as (n, m, 1, 1)
    transposed: bool = False


def rename(component: str, key: str, layout: Layout) -> Renamed | None:
    """Return where a single file keeps a tensor of a diffusers folder, None where it does not.

    HdbError for a name that no published model has.
    """
    if component == "unet":
        return Renamed(UNET + _unet(key, layout.plain_up_levels))
    if component == "vae":
        return _vae(key)
    text = layout.text.get(component)
    if text is None or key.endswith("position_ids"):
        return None
    return _open_clip(text.prefix, key) if text.open_clip else Renamed(text.prefix + key)


def unet_name(block: str) -> str:
    """Return the original path of a transformer block of the UNet, the same in all families."""
    return _unet(f"{block}.", LAYOUTS["sd1"].plain_up_levels).removesuffix(".")


def original_layer(family: str, path: str) -> str | None:
    """Name a layer of the UNet as the original network does, None where that has none."""
    layout = LAYOUTS.get(family)
    if layout is None:
        return None
    try:
        return _unet(f"{path}.weight", layout.plain_up_levels).removesuffix(".weight")
    except HdbError:
        return None


def _unet(key: str, plain_up_levels: int) -> str:
    block = re.fullmatch(r"(down|up)_blocks\.(\d+)\.(\w+)\.(\d+)\.(.*)", key)
    if block:
        side, level, kind, index, rest = block.groups()
        return _unet_block(side, int(level), kind, int(index), rest, plain_up_levels)
    middle = re.fullmatch(r"mid_block\.(resnets|attentions)\.(\d+)\.(.*)", key)
    if middle:
        kind, index, rest = middle.groups()
        number, rest = (1, rest) if kind == "attentions" else (2 * int(index), _resnet(rest))
        return f"middle_block.{number}.{rest}"
    return _head(key, _UNET_NAMES)


def _unet_block(side: str, level: int, kind: str, index: int, rest: str, plain: int) -> str:
    """Number a block as LDM does: all levels in one row, three entries each."""
    row = "input_blocks" if side == "down" else "output_blocks"
    if kind == "downsamplers":
        return f"{row}.{3 * (level + 1)}.0.{rest.replace('conv', 'op')}"
    if kind == "upsamplers":  # behind the residual block, and the attention where there is one
        return f"{row}.{3 * level + 2}.{1 if level < plain else 2}.{rest}"
    number = 3 * level + index + (1 if side == "down" else 0)
    inner = f"1.{rest}" if kind == "attentions" else f"0.{_resnet(rest)}"
    return f"{row}.{number}.{inner}"


def _vae(key: str) -> Renamed:
    side, _, rest = key.partition(".")
    if side not in ("encoder", "decoder"):  # quant_conv, post_quant_conv
        return Renamed(VAE + key)
    block = re.fullmatch(r"(?:down|up)_blocks\.(\d+)\.(\w+)\.(\d+)\.(.+)", rest)
    middle = re.fullmatch(r"mid_block\.(resnets|attentions)\.(\d+)\.(.+)", rest)
    conv = False
    if block:
        level, kind, index, inner = int(block[1]), block[2], block[3], block[4]
        place = f"down.{level}" if side == "encoder" else f"up.{3 - level}"
        sampler = {"downsamplers": "downsample", "upsamplers": "upsample"}.get(kind)
        inner = inner.replace("conv_shortcut", "nin_shortcut")
        new = f"{place}.{sampler}.{inner}" if sampler else f"{place}.block.{index}.{inner}"
    elif middle and middle[1] == "attentions":
        inner = _head(middle[3], _VAE_ATTENTION)
        new, conv = f"mid.attn_1.{inner}", inner.endswith("weight") and "norm" not in inner
    elif middle:
        new = f"mid.block_{int(middle[2]) + 1}.{middle[3]}"
    else:
        new = rest.replace("conv_norm_out", "norm_out")
    return Renamed(f"{VAE}{side}.{new}", conv=conv)


def _open_clip(prefix: str, key: str) -> Renamed:
    if key == "text_projection.weight":  # OpenCLIP multiplies from the other side
        return Renamed(f"{prefix}text_projection", transposed=True)
    layer = re.fullmatch(r"text_model\.encoder\.layers\.(\d+)\.(.+)", key)
    if not layer:
        return Renamed(prefix + _head(key, _OPEN_CLIP_NAMES))
    block = f"{prefix}transformer.resblocks.{layer[1]}"
    fused = re.fullmatch(r"self_attn\.([qkv])_proj\.(weight|bias)", layer[2])
    if fused:
        return Renamed(f"{block}.attn.in_proj_{fused[2]}", "qkv".index(fused[1]), 3)
    return Renamed(f"{block}.{_head(layer[2], _OPEN_CLIP_LAYER)}")


def _head(key: str, names: Mapping[str, str]) -> str:
    """Replace the beginning of a key; HdbError where none is known."""
    for old, new in names.items():
        if key.startswith(old):
            return new + key[len(old) :]
    raise HdbError(f"tensor {key!r} has no name in the single-file layout; write a folder")


def _resnet(rest: str) -> str:
    return _head(rest, _RESNET)


_RESNET = {
    "norm1.": "in_layers.0.",
    "conv1.": "in_layers.2.",
    "norm2.": "out_layers.0.",
    "conv2.": "out_layers.3.",
    "time_emb_proj.": "emb_layers.1.",
    "conv_shortcut.": "skip_connection.",
}
_UNET_NAMES = {
    "conv_in.": "input_blocks.0.0.",
    "time_embedding.linear_1.": "time_embed.0.",
    "time_embedding.linear_2.": "time_embed.2.",
    "add_embedding.linear_1.": "label_emb.0.0.",
    "add_embedding.linear_2.": "label_emb.0.2.",
    "conv_norm_out.": "out.0.",
    "conv_out.": "out.2.",
}
_VAE_ATTENTION = {  # the names of today and of the first diffusers
    "group_norm.": "norm.",
    "to_q.": "q.",
    "to_k.": "k.",
    "to_v.": "v.",
    "to_out.0.": "proj_out.",
    "query.": "q.",
    "key.": "k.",
    "value.": "v.",
    "proj_attn.": "proj_out.",
}
_OPEN_CLIP_LAYER = {
    "layer_norm1.": "ln_1.",
    "layer_norm2.": "ln_2.",
    "mlp.fc1.": "mlp.c_fc.",
    "mlp.fc2.": "mlp.c_proj.",
    "self_attn.out_proj.": "attn.out_proj.",
}
_OPEN_CLIP_NAMES = {
    "text_model.embeddings.token_embedding.weight": "token_embedding.weight",
    "text_model.embeddings.position_embedding.weight": "positional_embedding",
    "text_model.final_layer_norm.": "ln_final.",
}

EMA = "model_ema."
_EMA_UNET = f"{EMA}diffusion_model"
_WRAPPED = re.compile(rf"(?P<wrapper>\S*?)({re.escape(UNET)}|{re.escape(_EMA_UNET)})")

# CLIP's text encoder, by prefix, and how its names go on where `text_model.` was left out.
_CLIPS = tuple(
    dict.fromkeys(
        text.prefix
        for layout in LAYOUTS.values()
        for text in layout.text.values()
        if not text.open_clip
    )
)
_BARE = ("embeddings.", "encoder.", "final_layer_norm.")

# The parts of a path in the UNet, longer ones before those that they begin with.
_PARTS = re.compile(
    r"(?:in|out)put_blocks\d+(?=\d)|middle_block|transformer_blocks|(?:in|out|emb)_layers|"
    r"skip_connection|time_embed|label_emb0|cond_proj|proj_in|proj_out|attn[12]|to_out|to_[qkv]|"
    r"norm[123]?|ff|net|proj|conv|op|out|weight|bias|\d+"
)


def original_names(names: Iterable[str]) -> dict[str, str]:
    """Return, for each tensor of a single file, the name that the original code gives it: for
    nearly all the very same.

    Other tools wrap all names (`state_dict.`), leave `text_model.` out of CLIP's, or keep nothing
    but the moving average of the UNet, whose names have lost their dots.
    """
    names = list(names)
    wrapper = next((m["wrapper"] for m in map(_WRAPPED.match, names) if m), "")
    bare = [name.removeprefix(wrapper) for name in names]
    averaged = not any(name.startswith(UNET) for name in bare)
    found = {}
    for name, own in zip(names, bare, strict=True):
        if averaged and own.startswith(_EMA_UNET):
            own = UNET + _dotted(own.removeprefix(_EMA_UNET))
        for clip in _CLIPS:
            if own.startswith(clip) and own[len(clip) :].startswith(_BARE):
                own = f"{clip}text_model.{own[len(clip) :]}"
        found[name] = own
    return found


def _dotted(flat: str) -> str:
    """Put the dots back into the path of a tensor of the UNet; what is not such a path stays."""
    parts = _PARTS.findall(flat)
    if "".join(parts) != flat:
        return flat
    # "input_blocks10" is one part: where its number ends shows only in what comes after it.
    return re.sub(r"(blocks|label_emb)(\d)", r"\1.\2", ".".join(parts))
