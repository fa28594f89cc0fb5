"""Cut-down Stable Diffusion: random weights in the families' real layouts and names, narrow, as a
diffusers folder and as an original single file."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from registry.stable_diffusion.families import CONFIGS, FAMILIES
from registry.stable_diffusion.tokenizer import clip_tokenizer

SIDE = 8  # of latents: 64 px
UNET_WIDTH = 128  # a target must be wider than a = 100
TEXT_WIDTHS = {"text_encoder": 120, "text_encoder_2": 160}

# Original names of what lies outside the blocks, of a ResNet's parts, and of an autoencoder's.
OUTSIDE = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}
ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
OPEN_CLIP = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}

# What indexes of the hub list besides; of it, as in the hub's cache, the folders have nothing.
EXTRACTOR = {"feature_extractor": ["transformers", "CLIPImageProcessor"]}
CHECKER = {"safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"]}
ENCODER = {"image_encoder": ["transformers", "CLIPVisionModelWithProjection"]}
LISTED: dict[str, dict[str, list[str]]] = {
    "sd1": {"feature_extractor": ["transformers", "CLIPFeatureExtractor"], **CHECKER},
    "sd2": {**EXTRACTOR, **CHECKER},
    "sdxl": {**EXTRACTOR, **ENCODER},
}


class Narrow:
    """Checkpoints made when they are first asked for; tests copy what they change."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.configs = write_configs(root / "configs")

    def folder(self, family: str) -> Path:
        path = self.root / family
        return path if path.exists() else write_folder(self.configs, family, path)

    def single(self, family: str) -> Path:
        path = self.root / f"{family}.safetensors"
        return path if path.exists() else write_single(self.folder(family), path)


def write_configs(root: Path) -> Path:
    """Write every family's configuration, narrow; return `root`, which stands for CONFIGS."""
    shutil.copytree(CONFIGS, root)
    for folder in (path.parent.parent for path in CONFIGS.glob("*/unet/config.json")):
        changes: dict[str, dict[str, Any]] = {"vae": {"block_out_channels": [32] * 4}}
        blocks = len(_read(folder / "unet")["block_out_channels"])
        unet = {"block_out_channels": [UNET_WIDTH] * blocks, "attention_head_dim": 8}
        unet |= {"sample_size": SIDE, "cross_attention_dim": 0}
        for component, width in TEXT_WIDTHS.items():
            if (folder / component).is_dir():
                heads = {"num_attention_heads": 8, "intermediate_size": 64}
                changes[component] = {"hidden_size": width, "projection_dim": width, **heads}
                unet["cross_attention_dim"] += width
        if folder.name == "sdxl":
            unet |= {"addition_time_embed_dim": 8}
            unet |= {"projection_class_embeddings_input_dim": 6 * 8 + TEXT_WIDTHS["text_encoder_2"]}
        changes["unet"] = unet
        for component, values in changes.items():
            config = {**_read(folder / component), **values}
            (root / folder.name / component / "config.json").write_text(json.dumps(config))
    return root


def write_folder(configs: Path, family: str, out: Path, seed: int = 0) -> Path:
    """Write a diffusers folder of random weights, as fp16, of a family's (narrow) configuration."""
    import diffusers
    import transformers

    torch.manual_seed(seed)
    configs /= family
    index = _read(configs, "model_index.json")
    parts: dict[str, Any] = {}
    for name, (library, kind) in _components(index):
        made = getattr(diffusers if library == "diffusers" else transformers, kind)
        if name.startswith("tokenizer"):
            pad = FAMILIES[family].pads[name.endswith("_2")]
            parts[name] = clip_tokenizer(pad)
        elif name.startswith("text_encoder"):
            config = transformers.CLIPTextConfig.from_pretrained(configs / name)
            parts[name] = made(config).half()
        elif name == "scheduler":
            parts[name] = made.from_pretrained(configs / name)
        else:
            parts[name] = made.from_config(made.load_config(configs / name)).half()
    if "text_encoder_2" not in parts:
        parts |= {"safety_checker": None, "feature_extractor": None}
        parts["requires_safety_checker"] = False
    getattr(diffusers, index["_class_name"])(**parts).save_pretrained(out)
    listed = _read(out, "model_index.json") | LISTED.get(family, {})
    (out / "model_index.json").write_text(json.dumps(listed))
    return out


def write_single(folder: Path, out: Path) -> Path:
    """Write the weights of a folder as the original code names them, in one file."""
    from safetensors.torch import load_file

    tensors: dict[str, Tensor] = {}
    double = (folder / "text_encoder_2").is_dir()
    for file in sorted(folder.glob("*/*.safetensors")):
        component, weights = file.parent.name, load_file(file)
        if component == "unet":
            ups = {
                m[1] for m in map(re.compile(r"up_blocks\.(\d)\.attentions").match, weights) if m
            }
            parts = {"model.diffusion_model." + _unet(k, ups): v for k, v in weights.items()}
        elif component == "vae":
            parts = {}
            for key, value in weights.items():
                name = _vae(key)
                square = name.endswith(".weight") and re.search(r"attn_1\.(q|k|v|proj_out)\.", name)
                parts["first_stage_model." + name] = value[..., None, None] if square else value
        elif _read(file.parent)["hidden_act"] == "quick_gelu":
            head = "conditioner.embedders.0." if double else "cond_stage_model."
            parts = {f"{head}transformer.{_canonical(k)}": v for k, v in weights.items()}
        else:
            head = "conditioner.embedders.1.model." if double else "cond_stage_model.model."
            parts = {head + k: v for k, v in _open_clip(weights).items()}
        tensors |= {key: value.contiguous() for key, value in parts.items()}
    save_file(tensors | _leftovers(tensors), out)
    return out


def _leftovers(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return what original files hold besides: the schedule, buffers, and layers that
    nothing reads."""
    found = {"alphas_cumprod": torch.linspace(0.9991, 0.0047, 1000)}
    clip = "cond_stage_model.transformer.text_model.embeddings.position_ids"
    if any(key.startswith("cond_stage_model.transformer.") for key in tensors):
        found[clip] = torch.arange(77)[None]
    for head in ("cond_stage_model.model.", "conditioner.embedders.1.model."):
        if any(key.startswith(head) for key in tensors):
            found[f"{head}logit_scale"] = torch.tensor(4.6)
    head = "cond_stage_model.model."
    for key in [key for key in tensors if key.startswith(f"{head}transformer.resblocks.22.")]:
        found[key.replace(".22.", ".23.")] = tensors[key].clone()
        width = len(tensors[f"{head}ln_final.weight"])
        found[f"{head}text_projection"] = torch.eye(width).half()
    return found


def _components(index: dict[str, Any]) -> list[tuple[str, list[str]]]:
    return [(k, v) for k, v in index.items() if isinstance(v, list) and v[0]]


def _read(folder: Path, name: str = "config.json") -> dict[str, Any]:
    return json.loads((folder / name).read_text())


def _canonical(key: str) -> str:
    bare = key.startswith(("text_model.", "text_projection"))
    return key if bare else f"text_model.{key}"


def _unet(key: str, attentive: set[str]) -> str:
    """Name a tensor of the UNet; `attentive` up blocks have attention before the upsampler."""
    for new, old in OUTSIDE.items():
        if key.startswith(f"{new}."):
            return key.replace(new, old, 1)
    side, *rest = key.split(".")
    block, part, number = ("0", *rest[:2]) if side == "mid_block" else rest[:3]
    inner = ".".join(rest[2:] if side == "mid_block" else rest[3:])
    if part == "resnets":
        head, _, tail = inner.partition(".")
        inner = f"{RESNET[head]}.{tail}"
    i, j = int(block), int(number)
    if side == "mid_block":
        return f"middle_block.{1 if part == 'attentions' else 2 * j}.{inner}"
    if part == "downsamplers":
        return f"input_blocks.{3 * (i + 1)}.0.op.{inner.removeprefix('conv.')}"
    if part == "upsamplers":
        return f"output_blocks.{3 * i + 2}.{1 + (block in attentive)}.{inner}"
    start = (
        f"input_blocks.{3 * i + j + 1}" if side == "down_blocks" else f"output_blocks.{3 * i + j}"
    )
    return f"{start}.{int(part == 'attentions')}.{inner}"


def _vae(key: str) -> str:
    for new, old in ATTENTION.items():
        key = key.replace(f"attentions.0.{new}.", f"attentions.0.{old}.")
    key = key.replace("mid_block.attentions.0", "mid.attn_1").replace("conv_norm_out", "norm_out")
    key = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}", key)
    key = re.sub(r"down_blocks\.(\d)\.resnets\.", r"down.\1.block.", key)
    key = re.sub(r"down_blocks\.(\d)\.downsamplers\.0", r"down.\1.downsample", key)
    key = re.sub(r"up_blocks\.(\d)\.resnets\.", lambda m: f"up.{3 - int(m[1])}.block.", key)
    key = re.sub(r"up_blocks\.(\d)\.upsamplers\.0", lambda m: f"up.{3 - int(m[1])}.upsample", key)
    return key.replace("conv_shortcut", "nin_shortcut")


def _open_clip(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    weights = {_canonical(key): value for key, value in weights.items()}
    for key, value in weights.items():
        name = key.removeprefix("text_model.").replace("encoder.layers.", "transformer.resblocks.")
        for new, old in OPEN_CLIP.items():
            name = name.replace(f".{new}.", f".{old}.")
        for end in ("weight", "bias"):
            if key.endswith(f"self_attn.q_proj.{end}"):
                qkv = [weights[key.replace("q_proj", f"{part}_proj")] for part in "qkv"]
                found[name.replace(f"self_attn.q_proj.{end}", f"attn.in_proj_{end}")] = torch.cat(
                    qkv
                )
        if re.search(r"self_attn\.[qkv]_proj", key):
            continue
        name = name.replace("embeddings.token_embedding", "token_embedding")
        name = name.replace("embeddings.position_embedding.weight", "positional_embedding")
        name = name.replace("final_layer_norm", "ln_final")
        if name == "text_projection.weight":
            name, value = "text_projection", value.T
        found[name] = value
    return found
