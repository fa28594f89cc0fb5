"""All that pictures were drawn with, kept in their PNG files, so that they can be drawn again."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from PIL import Image

from registry.errors import HdbError

CHUNK = "hdb"  # the name of the text in a PNG file


@dataclass(frozen=True)
class Settings:
    """What `api.generate` was called with, and what it chose for options that were left open; a
    size that was left open stays so. No paths: people and LoRA files are named."""

    people: tuple[str, ...]
    prompt: tuple[str, ...]
    count: int
    seed: int
    steps: int
    guidance: float
    negative: str
    strength: float
    size: int | None
    scheduler: str | None
    loras: tuple[str, ...]
    base: str

    def text(self) -> str:
        """Return them as a PNG file holds them."""
        return json.dumps(asdict(self))


def read_settings(picture: Path) -> Settings:
    """Return what a picture of hdb was drawn with; HdbError if it does not say."""
    try:
        with Image.open(picture) as image:
            text = image.info.get(CHUNK)
    except FileNotFoundError:
        raise HdbError(f"no such file: {str(picture)!r}") from None
    except (OSError, ValueError, SyntaxError) as error:
        raise HdbError(f"{picture} is not a picture that can be read ({error})") from error
    if not isinstance(text, str):
        raise HdbError(f"{picture} does not say how it was drawn; give a PNG file of hdb gen")
    try:
        values = json.loads(text)
        found = {each.name: values[each.name] for each in fields(Settings)}
        for name, value in found.items():
            if isinstance(value, list):
                found[name] = tuple(value)
            if not isinstance(found[name], _KINDS[name]) or isinstance(value, bool):
                raise TypeError(f"{name} is {value!r}")
            if isinstance(value, list) and not all(isinstance(each, str) for each in value):
                raise TypeError(f"{name} is {value!r}")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise HdbError(f"{picture}: what it says of itself is damaged ({error})") from error
    return Settings(**found)


_TEXT, _TEXTS, _NUMBER, _NONE = (str,), (tuple,), (int, float), type(None)
_KINDS = {
    **{name: _TEXTS for name in ("people", "prompt", "loras")},
    **{name: _TEXT for name in ("negative", "base")},
    **{name: (int,) for name in ("count", "seed", "steps")},
    **{name: _NUMBER for name in ("guidance", "strength")},
    "size": (int, _NONE),
    "scheduler": (str, _NONE),
}
