"""Stable Diffusion's architectures with random weights: every tensor the real ones have, most
widths cut down."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from registry.spec import BaseSpec
from registry.tiny import TEMPLATE

UNET = (r".*\.attn[12]\.(to_q|to_k|to_v|to_out\.0)", r".*\.ff\.net\.0\.proj")
TEXT = (r".*\.self_attn\.(q_proj|k_proj|v_proj|out_proj)",)
TARGETS = {"sd1": 192, "sd2": 236, "sdxl": 806}


def text_encoder(layers: int, width: int, projected: bool = False) -> torch.nn.Module:
    config = CLIPTextConfig(
        vocab_size=64,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=2,
        max_position_embeddings=16,
        projection_dim=width,
    )
    return (CLIPTextModelWithProjection if projected else CLIPTextModel)(config)


def components(family: str) -> dict[str, torch.nn.Module]:
    """Build the networks of a family, cut down to `width` channels where the paper has 320."""
    torch.manual_seed(0)
    width = 16
    shared = {"sample_size": 8, "norm_num_groups": 8, "attention_head_dim": 2}
    if family == "sdxl":
        unet = UNet2DConditionModel(
            block_out_channels=(width, 2 * width, 4 * width),
            down_block_types=("DownBlock2D", *("CrossAttnDownBlock2D",) * 2),
            up_block_types=(*("CrossAttnUpBlock2D",) * 2, "UpBlock2D"),
            transformer_layers_per_block=[1, 2, 10],
            cross_attention_dim=48,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=6 * 8 + 32,
            use_linear_projection=True,
            **shared,
        )
    else:
        unet = UNet2DConditionModel(
            block_out_channels=(width, 2 * width, 4 * width, 4 * width),
            cross_attention_dim=16,
            use_linear_projection=family == "sd2",
            **shared,
        )
    vae = AutoencoderKL(
        block_out_channels=(8, 8, 16, 16),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
        norm_num_groups=4,
    )
    found = {"unet": unet, "vae": vae}
    if family == "sd1":
        found["text_encoder"] = text_encoder(12, 16)
    elif family == "sd2":
        found["text_encoder"] = text_encoder(23, 16)
    else:
        found["text_encoder"] = text_encoder(12, 16)
        found["text_encoder_2"] = text_encoder(32, 32, projected=True)
    return found


def save_folder(family: str, folder: Path) -> None:
    """Write a family's networks as a diffusers folder, as far as merging reads it."""
    for name, module in components(family).items():
        module.save_pretrained(folder / name)
    names = ", ".join(f'"{name}": ["x", "y"]' for name in components(family))
    (folder / "model_index.json").write_text(f"{{{names}}}")


def spec_of(family: str, files: Path) -> BaseSpec:
    """Describe the cut-down model as a base."""
    targets = {"unet": UNET, "text_encoder": TEXT}
    if family == "sdxl":
        targets["text_encoder_2"] = TEXT
    return BaseSpec(
        name=f"small-{family}",
        family=family,
        summary="random weights",
        licence="none",
        targets=targets,
        a=6,
        b=4,
        basis_seed=1,
        identifier="sks",
        resolution=64,
        template=TEMPLATE,
        hypernetwork=None,
        load=lambda device, dtype: None,  # type: ignore[arg-type, return-value]
        files=files,
    )
