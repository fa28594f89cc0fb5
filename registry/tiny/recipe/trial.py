"""Try what refinement should train, at which rank and rate: LiDBs from scratch on a base model, of
real people whom nothing has learned from, judged in another photo of each.

The same numbers are also taken of "a face", which shall stay anybody's: a setting that makes it the
person is too fast for the preservation of the class.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from hdbcli.config import PORTRAIT, RefineConfig, unnamed
from hdbcli.measure.statistics import bootstrap
from hdbcli.method.lidb import Theta
from hdbcli.model.base import Base, load_base
from hdbcli.model.sample import Picture, generate
from hdbcli.training.refine import portrait_loss, refine
from registry.plugins import load_registry
from registry.spec import Targets
from registry.stable_diffusion.families import ATTENTION, CONVOLUTIONS, TEXT
from registry.tiny import load_from
from registry.tiny.recipe.judge import read_pairs, recognisers

TARGETS: dict[str, Targets] = {
    "attention": {"unet": ATTENTION, "text_encoder": TEXT},
    "blocks": {"unet": CONVOLUTIONS[:1]},  # those of residual blocks alone
    "convolutions": {"unet": CONVOLUTIONS},
    "all": {"unet": (*ATTENTION, *CONVOLUTIONS), "text_encoder": TEXT},
}


@dataclass(frozen=True)
class Setting:
    """What one row of the table tries."""

    targets: str  # of TARGETS
    a: int
    b: int
    rank: int
    steps: int
    lr: float
    likeness: float


def try_settings(
    pipeline: Path, photos: Path, people: int, side: int, drawings: int, settings: Sequence[Setting]
) -> Iterator[str]:
    """Refine `people` by each setting on crops of `side` px, and yield a row of a table for each,
    after that of the photos that are learned."""
    pairs = read_pairs(photos, people, side)
    titles = "targets", "a, b, rank", "numbers", "steps, rate, likeness", "loss", "alike", "a face"
    yield f"| {' | '.join(titles)} |"
    yield "|---" * len(titles) + "|"
    yield f"| the photo itself | | | | | {_judged(pairs, [[first] for first, _ in pairs])} | |"
    for setting in settings:
        yield _row(_base(pipeline, side, setting), pairs, drawings, setting)


def _base(pipeline: Path, side: int, setting: Setting) -> Base:
    spec = replace(
        load_registry().get("tiny"),
        targets=TARGETS[setting.targets],
        a=setting.a,
        b=setting.b,
        resolution=side,
        hypernetwork=None,
        files=pipeline,
        load=lambda device, dtype: load_from(pipeline, device, dtype),
    )
    return load_base(spec, "cpu")


def _row(
    base: Base, pairs: Sequence[tuple[np.ndarray, np.ndarray]], drawings: int, setting: Setting
) -> str:
    faces = [base.faces([first]) for first, _ in pairs]
    latents = [each.latents for each in faces]
    config = RefineConfig(
        setting.steps,
        setting.rank,
        setting.lr,
        likeness=setting.likeness,
        optimizer="adamw",
        predicted=False,
    )
    start = base.first_theta(setting.rank, len(pairs))
    done = refine(base, start, latents, config, _quiet, faces)
    before = portrait_loss(base, None, latents).mean()
    told = []
    for prompt in (PORTRAIT, unnamed(PORTRAIT)):
        drawn = [
            [picture.image for picture in _drawn(base, done.theta[[person]], prompt, drawings)]
            for person in range(len(pairs))
        ]
        told.append(_judged(pairs, drawn))
    cells = (
        f"{setting.targets} ({len(base.injected.layers)})",
        f"{setting.a}, {setting.b}, {setting.rank}",
        f"{len(base.injected.layers) * setting.rank * (setting.a + setting.b):,}",
        f"{setting.steps}, {setting.lr:g}, {setting.likeness:g}",
        f"{before:.4f} to {done.loss_end.mean():.4f}",
        *told,
    )
    return f"| {' | '.join(cells)} |"


def _drawn(base: Base, theta: Theta, prompt: str, count: int) -> list[Picture]:
    return generate(base, theta, prompt, range(count), base.spec.sampling, _quiet)


def _quiet(stage: str, done: int, total: int) -> None:
    """Show no progress."""


def _judged(
    pairs: Sequence[tuple[np.ndarray, np.ndarray]], drawn: Sequence[Sequence[np.ndarray]]
) -> str:
    """Say how like the people in their second photos the pictures are, by every recogniser."""
    said = []
    for name, judge in recognisers().items():
        truth = judge.embed([second for _, second in pairs])
        rows = [
            judge.likeness(judge.embed(pictures), np.repeat(true[None], len(pictures), 0)).mean()
            for pictures, true in zip(drawn, truth, strict=True)
        ]
        said.append(f"{name} {bootstrap(torch.tensor(rows)).mean:.3f}")
    return ", ".join(said)
