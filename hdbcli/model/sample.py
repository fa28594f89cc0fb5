"""Generate pictures of an identity, and save one with how it was made inside."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from hdbcli import __version__
from hdbcli.config import Tell, unnamed
from hdbcli.model.base import Adapter, Base
from hdbcli.model.memory import Work
from hdbcli.model.settings import CHUNK, Settings
from registry.errors import HdbError, HdbWarning
from registry.files import write_kept
from registry.spec import BaseSpec, Limited, SampleSettings, passes_of

STRONG, GUIDED, SCALED = 3.0, 30.0, 2.0  # beyond these pictures come apart
SHOWN = 5  # words in a line
AT_ONCE = 4  # pictures of 512 px in one pass, more of smaller ones: memory stays bounded


@dataclass(frozen=True, eq=False)
class Picture:
    """One generated picture (H, W, 3) uint8 and the seed that makes it again."""

    image: np.ndarray
    seed: int


def generate(
    base: Base,
    adapter: Adapter | None,
    prompt: str | Sequence[str],
    seeds: Sequence[int],
    settings: SampleSettings,
    tell: Tell,
    keep: Callable[[Sequence[Picture]], None] | None = None,
) -> list[Picture]:
    """Draw one picture a seed. The adapter serves prompt and negative prompt, as in a merged model.

    One identity, and one prompt, serves all seeds; a batch of as many as there are seeds, one each.
    `keep` is handed all pictures so far, after each pass.
    """
    pictures: list[Picture] = []
    prompts = [prompt] * len(seeds) if isinstance(prompt, str) else prompt
    texts = [base.prompt(each) for each in prompts]
    for text in dict.fromkeys([*texts, settings.negative]):
        _warn_of_cut(base, text)
    side = settings.size or base.spec.resolution
    few = base.plan.at_once and max(1, base.plan.at_once // passes_of(settings.guidance))
    at_once = few or _at_once(side)
    passes = -(-len(seeds) // at_once)
    tell("draw", 0, passes * settings.steps)
    for done in range(passes):
        part = slice(done * at_once, (done + 1) * at_once)
        batch = seeds[part]
        theirs = adapter if adapter is None or len(adapter) == 1 else adapter[part]

        def progress(step: int, steps: int, done: int = done) -> None:
            tell("draw", done * steps + step, passes * steps)

        with base.adapted(theirs):
            images = base.backbone.sample(texts[part], settings, batch, progress)
        pictures += [Picture(image, seed) for image, seed in zip(images, batch, strict=True)]
        if keep is not None:
            keep(pictures)
    return pictures


def as_one(tell: Tell, parts: int) -> Tell:
    """Tell the progress of so many drawings, one after the other, as that of one piece of work."""
    done = 0

    def told(stage: str, step: int, steps: int) -> None:
        nonlocal done
        tell(stage, done * steps + step, parts * steps)
        done += step == steps

    return told


def _warn_of_cut(base: Base, text: str) -> None:
    """Say what the text encoder will not read, and whether that is the person."""
    end = base.backbone.unread(text) if isinstance(base.backbone, Limited) else ""
    if end:
        lost = ", and the person with it" if base.spec.identifier in end.split() else ""
        warnings.warn(f"the prompt is too long; {end!r} is cut off{lost}", HdbWarning, stacklevel=3)


def doubts(spec: BaseSpec, settings: SampleSettings, strength: float) -> list[str]:
    """Say which settings lie so far from usual ones that pictures will hardly show a person."""
    said = []
    if abs(strength) > STRONG:
        said.append(f"--strength {strength:g} is far from 1, what the identity was made for")
    if settings.guidance > GUIDED:
        said.append(f"--guidance {settings.guidance:g} is far above the base's {spec.guidance:g}")
    ratio = (settings.size or spec.resolution) / spec.resolution
    if not 1 / SCALED <= ratio <= SCALED:
        said.append(f"--size {settings.size} is far from the {spec.resolution} px that it draws")
    hints = [f"hint: {each}; expect a poor picture" for each in said]
    if settings.negative and settings.guidance <= 1:
        hints.append(
            f"hint: --negative counts nothing at --guidance {settings.guidance:g}; give more than 1"
        )
    return hints


def strange_words(base: Base, prompts: Iterable[str]) -> str:
    """Say which words of prompts a base that was taught a few captions was never taught, ""
    if none: those that its tokenizer, learned on its captions, has no token for."""
    if not base.spec.captions:
        return ""
    words = (w for text in prompts for w in re.findall(r"[^\W_]+", unnamed(text).lower()))
    strange = [repr(word) for word in dict.fromkeys(words) if not _is_token(base, word)]
    if not strange:
        return ""
    more = f" and {len(strange) - SHOWN} more" if len(strange) > SHOWN else ""
    listed = ", ".join(strange[:SHOWN]) + more
    return f"hint: {base.spec.name} was never taught {listed}; hdb styles lists what it draws"


def _is_token(base: Base, word: str) -> bool:
    try:
        return bool(base.backbone.token_embeddings(word))
    except HdbError:
        return False


def work_of(pictures: int, side: int, guidance: float, exact: bool = False) -> Work:
    """Say what drawing asks of a base. `exact` where LoRA files are added, which quantised weights
    cannot take."""
    passes = passes_of(guidance)
    samples = passes * min(pictures, _at_once(side))
    return Work(samples, side, trains=False, exact=exact, least=passes)


def _at_once(side: int) -> int:
    return max(1, min(32, AT_ONCE * 512**2 // side**2))


def png(image: np.ndarray, text: str, settings: Settings | None = None) -> bytes:
    """Return a PNG file with the `parameters` chunk that A1111, Forge and ComfyUI tools read, and
    one from which hdb draws the same again."""
    info, file = PngInfo(), BytesIO()
    info.add_text("parameters", text)
    if settings is not None:
        info.add_text(CHUNK, settings.text())
    Image.fromarray(image).save(file, format="PNG", pnginfo=info)
    return file.getvalue()


def save_crops(crops: Sequence[np.ndarray], path: Path) -> None:
    """Write crops (H, W, 3) of one size side by side as a PNG that says nothing else."""
    image = Image.fromarray(np.concatenate(list(crops), axis=1))
    write_kept(path, lambda file: image.save(file, format="PNG"), False)


def parameters_text(
    prompt: str,
    settings: SampleSettings,
    picture: Picture,
    base: str,
    identity: str,
    more: Mapping[str, str] | None = None,
) -> str:
    """Describe a picture in A1111's form: prompt, negative prompt, one line of `key:
    value` pairs."""
    height, width = picture.image.shape[:2]
    pairs = {
        "Steps": settings.steps,
        "Sampler": settings.scheduler or "default",
        "CFG scale": settings.guidance,
        "Seed": picture.seed,
        "Size": f"{width}x{height}",
        "Model": base,
        "Identity": identity,
        **({"Spacing": "trailing"} if settings.trailing else {}),
        **(more or {}),
        "Version": f"hdb {__version__}",
    }
    lines = [prompt]
    if settings.negative:
        lines.append(f"Negative prompt: {settings.negative}")
    lines.append(", ".join(f"{key}: {_quoted(value)}" for key, value in pairs.items()))
    return "\n".join(lines)


def _quoted(value: object) -> str:
    text = str(value)
    return json.dumps(text, ensure_ascii=False) if any(c in text for c in ',:\n"') else text
