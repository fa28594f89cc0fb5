"""The defaults of every stage in one place, light enough for `hdb --help` to read, and the user's
own: `config.toml` in the store or the user's folder of settings."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from registry import store
from registry.errors import HdbError

DEVICES = ("cpu", "cuda", "mps")
OPTIMIZERS = ("adamw8bit", "adamw")
LARGEST_SEED = 2**63 - 1  # torch takes twice as large ones: a first seed may be counted up from
PRECISIONS = ("auto", "fp32")
SCHEDULERS = ("ddim", "dpm++", "euler", "euler-a", "lcm", "unipc")
MEMORIES = ("auto", "low", "normal", "half", "recompute")
TRACKERS = ("tensorboard", "wandb", "mlflow", "trackio", "aim", "comet_ml", "clearml")
# Names of picture files; what is read is decided by content.
PICTURES = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".png", ".apng", ".webp", ".heic", ".heif", ".hif"),
    *(".avif", ".tif", ".tiff", ".gif", ".bmp", ".dib", ".jp2", ".ppm", ".pgm"),
)
PLACEHOLDER = "[V]"
PORTRAIT = "a [V] face"  # the one prompt of training: HyperDreamBooth §3.3
CAPTIONS = (  # of HyperDreamBooth's project page
    "An Instagram selfie of a [V] face",
    "A Pixar character of a [V] face",
    "A [V] face with bark skin",
    "A [V] face as a rock star",
    "A professional shot of a [V] face",
)
PROMPTS = (PORTRAIT, *CAPTIONS)

METHOD_NAMES = (  # of `hdb compare`: HyperDreamBooth, its ablations, and other methods
    "hyperdreambooth",
    "no-hypernetwork",
    "hypernetwork-only",
    "one-pass",
    "no-relaxation",
    "no-likeness",
    "free-relaxation",
    "lora",
    "lora-all",
    "dreambooth",
    "dreambooth-all",
    "inversion",
)
MAIN_METHODS = "hyperdreambooth,lora,dreambooth,inversion"


def unnamed(prompt: str) -> str:
    """Return a prompt without its [V]: of any person."""
    return " ".join(prompt.replace(PLACEHOLDER, " ").split())


# A caller that draws progress is told (stage, done, in all).
Tell = Callable[[str, int, int], None]


@dataclass(frozen=True)
class RefineConfig:
    """How to refine. `batch` noises and timesteps are drawn a step, over all the crops, and
    `likeness` weighs the distance of drawn portraits; None: as the base's spec says. Styles are
    held to those of the start where that is `predicted` and not theta_0."""

    steps: int = 40
    rank: int = 4
    lr: float = 2e-2
    batch: int | None = None
    seed: int = 0
    optimizer: str = "adamw8bit"
    likeness: float | None = None
    predicted: bool = True


@dataclass(frozen=True)
class BankConfig:
    """How to optimise the LiDBs of a bank: as refinement, from theta_0, of `at_once` people."""

    steps: int = 200
    rank: int = 1
    lr: float = 5e-3
    batch: int | None = None
    at_once: int = 64
    seed: int = 0
    optimizer: str = "adamw8bit"

    def refine(self) -> RefineConfig:
        """Return the settings of each person."""
        shared = (self.steps, self.rank, self.lr, self.batch, self.seed, self.optimizer)
        return RefineConfig(*shared)


# A new identity on a base without a hypernetwork starts from theta_0, as those of the bank do: ten
# times the iterations of refinement, at the bank's learning rate.
UNPREDICTED_STEPS = 10 * RefineConfig.steps
UNPREDICTED_LR = BankConfig.lr
# The rate of a prediction that is refined by the diffusion loss alone: at the rate that likeness
# takes, forty iterations on one photo lose more of the person than they give.
DIFFUSION_LR = 5e-4


@dataclass(frozen=True)
class PretrainConfig:
    """How to train a hypernetwork; its shape is HyperConfig's."""

    steps: int = 4500
    lr: float = 4e-4
    batch: int = 32
    beta: float = 0.1  # weight of the distance from the bank, where there is one
    prior: float = 5.0  # weight of leaving alone what is drawn without [V]
    likeness: float = 0.0  # weight of the distance of drawn faces from the true one
    share: int = 4  # every N-th person of a batch gets the likeness and prior losses
    any_colours: tuple[str, ...] = ()  # captions with these have likeness in any colours
    seed: int = 0
    optimizer: str = "adamw8bit"
    precision: str = "auto"
    save_seconds: float = 120.0  # between checkpoints
    look: int = 200  # steps between looks at people held out
    held_out: int = 64  # people, but no more than a tenth of all
    checkpoint: Path | None = None  # a run that was cut off goes on from it
    accumulate: int = 1  # parts in which a batch is taken: less memory, the same gradient


def user_file() -> Path:
    """Return where the user's own defaults lie, whether they are there or not."""
    return store.root("config") / "config.toml"


def user_defaults() -> dict[str, Any]:
    """Return what that file says, nothing if there is none; HdbError for what is no TOML."""
    file = user_file()
    if not file.exists():
        return {}
    if sys.version_info >= (3, 11):  # to import it takes time, and hardly anybody has the file
        import tomllib
    else:
        import tomli as tomllib
    try:
        return tomllib.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise HdbError(f"{file} cannot be read ({error}); mend it, or take it away") from error
