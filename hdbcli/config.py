"""The defaults of every stage in one place, light enough for `hdb --help` to read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

DEFAULT_BASE = "tiny"
DEVICES = ("cpu", "cuda", "mps")
OPTIMIZERS = ("adamw8bit", "adamw")

# Whoever wants to draw progress is told (stage, done, in all).
Tell = Callable[[str, int, int], None]


@dataclass(frozen=True)
class RefineConfig:
    """How to refine. `batch` noises and timesteps are drawn a step, over all the crops."""

    steps: int = 40
    rank: int = 4
    lr: float = 5e-3
    batch: int = 8
    seed: int = 0
    optimizer: str = "adamw8bit"


@dataclass(frozen=True)
class PretrainConfig:
    """How to train a hypernetwork; its shape is HyperConfig's."""

    steps: int = 1200
    lr: float = 5e-4
    batch: int = 48
    seed: int = 0
    optimizer: str = "adamw8bit"
