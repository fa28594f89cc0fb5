"""What a base model must offer: a spec that loads nothing, and one language after loading.

A spec is data: it can be listed without torch. `load` is called only when a command needs the
model, and returns a `Backbone`, the same few members for every family, so that training and
sampling never ask which family they serve.

Shapes: B samples, H x W pixels; latents are (B, c, h, w).
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, TypeAlias, runtime_checkable

from registry.errors import HdbError

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor, nn

NOISIEST = 1 - 2**-20  # of times: float32 rounds what lies closer up to 1, where no timestep is
NAME_PATTERN = r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,63}"  # names of bases and of identities alike

Point = tuple[float, float]
Targets: TypeAlias = Mapping[str, tuple[str, ...]]


def passes_of(guidance: float) -> int:
    """Return how often the network runs a sample in a step of drawing: guidance, which above 1 is
    on, compares what the prompt and the negative prompt say."""
    return 2 if guidance > 1 else 1


def shifted(t: Tensor, shift: float) -> Tensor:
    """Move times from 0 to 1 towards the noise (Esser et al. 2024, eq. 23); 1 leaves them."""
    return shift * t / (1 + (shift - 1) * t)


@dataclass(frozen=True)
class SampleSettings:
    """How to sample, apart from what: the defaults here are those of `hdb gen`, but for steps and
    guidance, for which it asks the base's spec."""

    steps: int = 25
    guidance: float = 3.0
    negative: str = ""
    size: int | None = None  # pixels; None is the resolution of the spec
    scheduler: str | None = None  # None is the scheduler of the base
    trailing: bool = False  # space the steps from the last noise down, as few-step models expect


@dataclass(frozen=True)
class FewSteps:
    """How a distilled model, or a base with a distilled LoRA, is to be sampled."""

    kind: str  # such as Lightning
    steps: int
    guidance: float | None  # None is the base's own
    scheduler: str

    def of(self, settings: SampleSettings) -> SampleSettings:
        """Return settings changed to these."""
        guidance = settings.guidance if self.guidance is None else self.guidance
        return replace(
            settings,
            steps=self.steps,
            guidance=guidance,
            scheduler=self.scheduler,
            trailing=True,
        )


def _unchanged() -> None:
    """Trust the files of a base that ships in a package."""


class Backbone(Protocol):
    """A loaded base model, in the one language that training and sampling speak."""

    @property
    def components(self) -> Mapping[str, nn.Module]:
        """Name -> module that holds targets, by the names that `BaseSpec.targets` uses."""

    def encode_images(self, images: Tensor) -> Tensor:
        """Turn images (B, 3, H, W) in [-1, 1] into latents (B, c, h, w)."""

    def decode_latents(self, latents: Tensor) -> np.ndarray:
        """Turn latents (B, c, h, w) back into pictures (B, H, W, 3)."""

    def predict(self, latents: Tensor, prompts: Sequence[str], noise: Tensor, t: Tensor) -> Tensor:
        """Return what the network answers (B, c, h, w) when it sees the latents under noise.

        `noise` has the shape of `latents`. `t` (B,) in [0, 1) is the fraction of the noise
        schedule. The prompts already carry the identifier; "" is what guidance leads away from.
        """

    def target(self, latents: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Return the true answer (B, c, h, w): the diffusion loss is the distance from it."""

    def sample(
        self,
        prompts: Sequence[str],
        settings: SampleSettings,
        seeds: Sequence[int],
        progress: Callable[[int, int], None],
    ) -> np.ndarray:
        """Return pictures (B, H, W, 3), one a prompt; each depends on its own seed alone.

        `progress` is told (steps done, steps in all) after each step.
        """

    def token_embeddings(self, word: str) -> Sequence[tuple[nn.Embedding, int]]:
        """Return, for each text encoder, its embedding and the row of `word`, which is one token.

        Raise HdbError if it is more.
        """

    def save(self, folder: Path) -> None:
        """Write the model as it is now, residuals fused or not, as a diffusers folder.

        Merging asks it for `model_index.json`, with the name of each component, and for
        `COMPONENT/model.safetensors`, named by module path.
        """


@runtime_checkable
class Frugal(Protocol):
    """What a backbone may offer beside, for little memory; one that does not works as it
    always does."""

    def save_memory(self, recompute: bool) -> None:
        """From now on decode picture by picture, and with `recompute` compute what the backward
        pass needs again instead of keeping it (gradient checkpointing)."""

    def free_autoencoder(self) -> None:
        """Let go of the autoencoder until something is encoded or decoded again."""


@runtime_checkable
class Limited(Protocol):
    """What a backbone may offer beside, if its text encoder reads a limited number of tokens."""

    def unread(self, prompt: str) -> str:
        """Return the end of a prompt that is cut off, "" where all is read."""


@runtime_checkable
class Drafting(Backbone, Protocol):
    """What a backbone may be as well, so that training can learn from the pictures it draws."""

    @property
    def renews(self) -> bool:
        """Whether every step starts from fresh noise, so that early ones decide what is drawn."""

    def times(self, steps: int) -> Tensor:
        """Return the times (steps + 1,) between which a picture is drawn, from 1 down to 0."""

    def split(
        self, latents: Tensor, noise: Tensor, t: Tensor, answer: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return what an answer says of the latents under noise: the picture, and the noise."""

    def decode(self, latents: Tensor) -> Tensor:
        """Return the images (B, 3, H, W), about -1..1, of latents, with gradients."""


@dataclass(frozen=True)
class BaseSpec:
    """One base model; checked when made, so that a broken plug-in is told at its own door."""

    name: str
    family: str  # identities move between bases of one family only
    summary: str
    licence: str
    targets: Targets  # component -> patterns, fullmatched on paths of linear layers, convolutions
    a: int  # numbers of a core's down side, per target and rank
    b: int  # numbers of its up side
    basis_seed: int  # one basis a base, so that its hypernetwork fits all of its identities
    identifier: str  # the rare token that stands for the user's [V]
    resolution: int  # pixels
    template: tuple[Point, Point, Point, Point, Point]  # where the crop puts the YuNet points
    hypernetwork: Path | None
    load: Callable[[str, str], Backbone]  # (device, dtype name); imports torch only when called
    files: Path | None = None  # the diffusers folder or single file behind it, which merging copies
    check: Callable[[], None] = _unchanged  # raises HdbError if those files have changed
    budget: int = 120_000  # bytes that an identity may have by default
    batch: int = 1  # samples a step of refinement
    portraits: int = 1  # that an identity's likeness is measured on: more where they are cheap
    likeness: float = 0.0  # of drawn portraits, its weight in refinement: where drawing is cheap
    guidance: float = SampleSettings.guidance  # by default
    steps: int = SampleSettings.steps  # of drawing, by default
    # Targets to choose from by name, such as attention and all; `targets` are the default.
    target_sets: Mapping[str, Targets] = field(default_factory=dict)
    few_steps: FewSteps | None = None  # of a base that was distilled
    captions: tuple[str, ...] = ()  # prompts that it was trained on, if it knows no others

    def with_targets(self, name: str) -> BaseSpec:
        """Return this spec with the target set of that name, and no other; HdbError if it
        offers none such."""
        if name not in self.target_sets:
            offers = " and ".join(self.target_sets) or "one set without a name; drop --targets"
            raise HdbError(f"base model {self.name} has no targets {name!r}; it has {offers}")
        chosen = self.target_sets[name]
        return replace(self, targets=chosen, target_sets={name: chosen})

    @property
    def sampling(self) -> SampleSettings:
        """Return how `hdb gen` samples by default."""
        settings = SampleSettings(self.steps, self.guidance)
        return self.few_steps.of(settings) if self.few_steps else settings

    def __post_init__(self) -> None:
        """Raise HdbError for a spec that could not work."""
        if not isinstance(self.name, str) or not re.fullmatch(NAME_PATTERN, self.name):
            raise HdbError(f"base model name {self.name!r} does not match {NAME_PATTERN}")
        for word in ("family", "identifier"):
            value = getattr(self, word)
            if not isinstance(value, str) or not value.strip():
                raise HdbError(f"base model {self.name}: {word} is {value!r}; give a word")
        for name in ("a", "b", "resolution", "basis_seed", "budget", "batch", "portraits", "steps"):
            value, low = getattr(self, name), 0 if name == "basis_seed" else 1
            if not isinstance(value, int) or value < low:
                raise HdbError(
                    f"base model {self.name}: {name} is {value!r}; an integer from {low} is needed"
                )
        if isinstance(self.captions, str) or not all(isinstance(c, str) for c in self.captions):
            raise HdbError(
                f"base model {self.name}: captions are {self.captions!r}; give a tuple of strings"
            )
        for number in ("likeness", "guidance"):
            value = getattr(self, number)
            if not isinstance(value, int | float) or not 0 <= value < math.inf:
                raise HdbError(
                    f"base model {self.name}: {number} is {value!r}; a number from 0 is needed"
                )
        if not callable(self.load):
            raise HdbError(f"base model {self.name}: load must be callable")
        for targets in (self.targets, *self.target_sets.values()):
            _check_targets(self.name, targets)
        _check_template(self.name, self.template)


def _check_targets(name: str, targets: Targets) -> None:
    """Raise HdbError unless there is at least one pattern and all of them compile."""
    if not isinstance(targets, Mapping) or not any(targets.values()):
        raise HdbError(f"base model {name}: targets hold no pattern; give at least one")
    for component, patterns in targets.items():
        if isinstance(patterns, str):  # it would be read letter by letter
            raise HdbError(
                f"base model {name}: patterns of {component} are one string {patterns!r}; "
                "give a tuple of strings"
            )
        for pattern in patterns:
            try:
                re.compile(pattern)
            except (re.error, TypeError) as error:
                raise HdbError(
                    f"base model {name}: {component} has a bad pattern {pattern!r}: {error}"
                ) from error


def _check_template(name: str, template: Sequence[Point]) -> None:
    """Raise HdbError unless there are five points in the unit square."""
    try:
        points = [(float(x), float(y)) for x, y in template]
    except (TypeError, ValueError) as error:
        raise HdbError(
            f"base model {name}: template {template!r} is not made of (x, y) points"
        ) from error
    inside = all(math.isfinite(v) and 0 <= v <= 1 for point in points for v in point)
    if len(points) != 5 or not inside:
        raise HdbError(
            f"base model {name}: template {template!r} needs five points in the unit square"
        )
