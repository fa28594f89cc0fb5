"""Recognise the LoRA files of other tools by their keys, to say what they are."""

from __future__ import annotations

import re
from collections.abc import Iterable

_PARTS = r"lora_(up|down|mid)\.weight|alpha|dora_scale|hada_w.*|lokr_w.*"
STYLES = {
    "kohya": re.compile(rf"(lora|lycoris)_\w+\.({_PARTS})"),
    "diffusers": re.compile(
        r".+[._](lora_[AB](\.default)?|lora(_linear_layer)?\.(up|down))\.weight"
    ),
}


def lora_style(names: Iterable[str]) -> str | None:
    """Return which tool's keys a file's tensors have, None where they are no LoRA's."""
    for name in names:
        for style, pattern in STYLES.items():
            if pattern.fullmatch(name):
                return style
    return None
