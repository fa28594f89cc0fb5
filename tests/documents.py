"""What docs/json.md says that each command prints with --json, and what of a document is not so."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

PAGE = (Path(__file__).resolve().parents[1] / "docs/json.md").read_text(encoding="utf-8")
COMMON, FAILED = (json.loads(each) for each in re.findall(r"```json\n(.*?)```", PAGE, re.S)[:2])
SHAPES = {
    words: json.loads(shape)
    for words, shape in re.findall(r"^## hdb ([^\n]+)\n\n```json\n(.*?)```", PAGE, re.S | re.M)
}
TYPES: dict[str, Any] = {
    "any": lambda value: True,
    "text": lambda value: isinstance(value, str),
    "path": lambda value: isinstance(value, str) and os.path.isabs(value),
    "count": lambda value: type(value) is int,
    "number": lambda value: type(value) in (int, float),
    "bool": lambda value: type(value) is bool,
}


def off(value: Any, shape: Any, where: str = "") -> list[str]:
    """Return what of a document is not as its shape says."""
    if isinstance(shape, str):
        if shape.endswith("?") and value is None:
            return []
        return [] if TYPES[shape.rstrip("?")](value) else [f"{where}: {value!r} is no {shape}"]
    if isinstance(shape, list):
        if not isinstance(value, list):
            return [f"{where}: {value!r} is no list"]
        return [p for i, each in enumerate(value) for p in off(each, shape[0], f"{where}[{i}]")]
    if not isinstance(value, dict):
        return [f"{where}: {value!r} is no object"]
    known = {name.rstrip("?"): each for name, each in shape.items()}
    free = {name.rstrip("?") for name in shape if name.endswith("?")}
    wrong = [f"{where}.{name} is missing" for name in known.keys() - value.keys() - {"*"}]
    for name, each in value.items():
        if name not in known and "*" not in known:
            wrong.append(f"{where}.{name} is not on the page")
        elif not (each is None and name in free):
            wrong += off(each, known.get(name, known.get("*")), f"{where}.{name}")
    return wrong


def match_page(words: tuple[object, ...], document: Any) -> None:
    """Assert that what a command printed is as the page says."""
    parts = [str(word) for word in words]
    name = " ".join(parts[:2]) if parts[0] in ("base", "train") else parts[0]
    assert off(document, {**COMMON, **SHAPES[name]}, name) == []
