"""Read the keys of other tools' LoRA files: which layer each tensor changes, and which part of the
change it is. What cannot be read is named for what it is."""

from __future__ import annotations

import re
from collections.abc import Iterable

_NAME = r"(?:\.(?!weight|bias)[^.]+)?"  # PEFT may keep the adapter's own name in a key
# What follows the name of a layer, for each part of a change: kohya's spelling, diffusers' of all
# ages, PEFT's and LyCORIS' (whose parts ComfyUI and OneTrainer write too).
_LORA = r"(?:\.lora_|_lora\.|\.lora\.|\.lora_linear_layer\.)"
_PARTS = {
    "down": rf"{_LORA}down\.weight|\.lora_A{_NAME}\.weight",
    "up": rf"{_LORA}up\.weight|\.lora_B{_NAME}\.weight",
    "up_bias": rf"\.lora_B{_NAME}\.bias|\.lora_up\.bias",
    "mid": r"\.lora_mid\.weight",
    "alpha": r"\.alpha",
    "dora_scale": r"\.dora_scale",
    "magnitude": rf"[._]lora_magnitude_vector{_NAME}(?:\.weight)?",
    **{f"hada_{p}": rf"\.hada_{p}{_NAME}" for p in ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")},
    **{
        f"lokr_{p}": rf"\.lokr_{p}{_NAME}"
        for p in ("w1_a", "w1_b", "w2_a", "w2_b", "w1", "w2", "t2")
    },
    "diff": r"\.diff",
    "diff_b": r"\.diff_b",
    "w_norm": r"\.w_norm",
    "b_norm": r"\.b_norm",
    "set_weight": r"\.set_weight",
}
_KEY = re.compile(f"(?P<stem>.+?)(?:{'|'.join(f'(?P<{p}>{end})' for p, end in _PARTS.items())})")

# What an adapter may be besides -> a sign of it in a key. hdb adds none of these.
_OTHERS = {
    "a GLoRA": r"\.(a1|a2|b1|b2|bm)\.weight$|\.glora_[A-E]\b",
    "an OFT or BOFT": r"\.(oft_(blocks|diag|R|S)|boft_[Rs])\b",
    "an (IA)3": r"\.(on_input|ia3_l)\b",
    "a VeRA": r"\.p?vera_(lambda_[bd]|A|B)\b",
    "an AdaLoRA": r"\.lora_E\b",
    "a T-LoRA": r"\.(lambda_layer|[qp]_layer\.weight)$",
    "a LoRA of token embeddings": r"\.lora_embedding_[AB]\b",
    "a ControlLoRA": r"^(lora_controlnet$|input_hint_block\.)",
    "an IP-Adapter": r"^(image_proj|ip_adapter)\.",
    "a textual inversion embedding": r"^(emb_params|string_to_param.*|clip_[lgh])$",
    "a PEFT adapter that is not a LoRA": r"\.(hra_u|miss_block|bone_block|fourierft_\w+|waveft_\w+|"
    r"randlora_\w+|delora_\w+|vblora_\w+|c3a_kernel|shira_weight|road_\w+|gralora_\w+|hira_\w+|"
    r"psoft_R|tinylora_v|trainable_tokens_delta|ln_tuning_layers)\b",
}
_OTHERS_OF = {what: re.compile(sign) for what, sign in _OTHERS.items()}

# Models of other kinds, by a part of their layers' names, dotted or flattened.
ARCHITECTURES = {
    "Stable Diffusion 3": re.compile(r"joint_(transformer_)?blocks[._]"),
    "Flux": re.compile(r"(double|single|single_transformer)_blocks[._]"),
    "Stable Cascade": re.compile(r"lora_prior_"),
    "Wan": re.compile(r"(^|[._])blocks[._]\d+[._](self|cross)_attn"),
    "a diffusion transformer": re.compile(r"^(lora_)?transformer[._]"),
}

PEFT = "base_model.model."  # what PEFT itself writes before the path of a layer
_ANYWHERE = {"alpha", "diff", "diff_b", "set_weight"}  # parts that a model's own tensor may end in
STYLES = {
    "kohya": re.compile(r"(lora|lycoris)_\w+"),
    "PEFT": re.compile(rf"(\w+\.)?{re.escape(PEFT)}.+"),
    "ComfyUI": re.compile(r"(model\.)?diffusion_model\..+|text_encoders\..+"),
    "diffusers": re.compile(r".+"),
}


def split(key: str) -> tuple[str, str] | None:
    """Return the name of the layer and the part of its change, None for a key of no LoRA."""
    match = _KEY.fullmatch(key)
    return (match["stem"], str(match.lastgroup)) if match else None


def lora_style(names: Iterable[str]) -> str | None:
    """Return which tool's keys a file's tensors have, None where they are not a LoRA's."""
    for name in names:
        stem, part = split(name) or ("", "")
        for style, pattern in STYLES.items():
            if pattern.fullmatch(stem) and (style != "diffusers" or part not in _ANYWHERE):
                return style
    return None


def other_adapter(names: Iterable[str]) -> tuple[str, str] | None:
    """Return what an adapter is that hdb does not read, and the key that tells; None if all keys
    may be a LoRA's."""
    for name in names:
        for what, sign in _OTHERS_OF.items():
            if sign.search(name):
                return what, name
    return None


def architecture(names: Iterable[str]) -> str | None:
    """Return which other kind of model the layers of a LoRA or of a checkpoint are of."""
    for name in names:
        for what, sign in ARCHITECTURES.items():
            if sign.search(name):
                return what
    return None
