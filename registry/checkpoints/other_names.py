"""Read the names that other tools give the tensors of an original single file.

Some wrap all names (`state_dict.`), leave `text_model.` out of CLIP's, or keep nothing but the
moving average of the UNet, whose names have lost their dots. Each is turned into the name that the
original code gives the tensor, so that everything after it knows one set of names.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from registry.checkpoints.ldm import LAYOUTS, UNET

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
    nearly all the very same."""
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
