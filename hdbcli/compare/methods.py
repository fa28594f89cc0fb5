"""Who competes in `hdb compare`: HyperDreamBooth, its ablations, and the methods beside it,
as data.

HyperDreamBooth table 1 and table 2. One loop trains them all with one batch size; they differ in
what is trained, from where, how long and how fast.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch

from hdbcli.compare.baselines import (
    CLASS_PROMPTS,
    class_prior,
    dreambooth_trial,
    inversion_trial,
    lora_trial,
)
from hdbcli.config import DIFFUSION_LR, RefineConfig, Tell
from hdbcli.method.hypernet import Faces, HyperNetwork
from hdbcli.method.lidb import Theta
from hdbcli.method.relax import relax, stack
from hdbcli.model.base import Base
from hdbcli.training.objective import Samples
from hdbcli.training.personalise import settle
from hdbcli.training.refine import Trial, lidb_trial, with_losses
from registry.errors import HdbError


@dataclass(frozen=True)
class Contender:
    """One method: what it trains, and its defaults."""

    name: str
    summary: str
    trains: str  # lidb, lora, inversion or dreambooth
    steps: int
    lr: float
    rank: int = RefineConfig.rank
    predicted: bool = False  # starts from the hypernetwork, or rests on it
    iterations: int | None = None  # of the hypernetwork's decoder; None is all of them
    class_pictures: int = 0  # of a prior, which the base draws
    class_prompts: int = 1  # of "a face" alone, or of it in so many styles
    optimizer: str = RefineConfig.optimizer
    likeness: float | None = 0.0  # weight of what is drawn, None is the base's own
    preserves: bool = False  # holds answers to other prompts, without pictures of a class
    rates: tuple[tuple[int, float], ...] = ()  # (steps, lr) of other schedules
    people: int | None = None  # learns only the first so many

    @property
    def family(self) -> str:
        """Return the method's name without its schedule: what NAME@STEPS have in common."""
        return self.name.partition("@")[0]

    def of_steps(self, steps: int) -> Contender:
        """Return the method with a whole schedule of so many steps, at the rate of the schedule
        nearest in length that has one."""
        known = (*self.rates, (self.steps, self.lr))
        _, rate = min(known, key=lambda one: abs(math.log(max(one[0], 1) / steps)))
        return replace(self, name=f"{self.family}@{steps}", steps=steps, lr=rate)

    def at_once(self, side: int) -> int:
        """Return how many people learn side by side on a base that draws `side` pixels: 25 of 128,
        one of 512. DreamBooth changes the base, and a prior is one person's, so one."""
        alone = self.trains == "dreambooth" or self.class_pictures > 0
        return 1 if alone else max(1, 25 * 128**2 // side**2)


_FULL = Contender(
    "hyperdreambooth",
    "predict, relax, 40 iterations",
    "lidb",
    RefineConfig.steps,
    RefineConfig.lr,
    predicted=True,
    likeness=None,
    preserves=True,
)


def _without(name: str, summary: str, **changes: Any) -> Contender:
    return replace(_FULL, name=name, summary=summary, **changes)


# Of all weights the 8-bit optimizer would be the slower one on a CPU.
_LORA = Contender("lora", "LoRA DreamBooth", "lora", 1200, 1e-3)
_DREAMBOOTH = Contender(
    "dreambooth",
    "all weights, prior preservation",
    "dreambooth",
    1200,
    1.5e-4,
    class_pictures=32,
    optimizer="adamw",
    rates=((40, 3e-4), (400, 1e-4)),
)


def _with_every_loss(contender: Contender) -> Contender:
    """Give a method the losses that HyperDreamBooth has here: likeness, and pictures without [V]
    held as they were, in styles too."""
    return replace(
        contender,
        name=f"{contender.name}-all",
        summary=f"{contender.summary}, every loss of hdb",
        likeness=None,
        class_pictures=8 * len(CLASS_PROMPTS),
        class_prompts=len(CLASS_PROMPTS),
    )


CONTENDERS = {
    contender.name: contender
    for contender in (
        _FULL,
        _without("no-hypernetwork", "theta_0, 40 iterations", lr=5e-3, predicted=False),
        _without("hypernetwork-only", "predict", steps=0, lr=0.0, rank=1),
        _without("one-pass", "predict with k = 1", iterations=1),
        _without("no-relaxation", "predict, 40 iterations at rank 1", rank=1),
        _without(
            "no-likeness", "40 iterations of the diffusion loss", lr=DIFFUSION_LR, likeness=0.0
        ),
        _without("free-relaxation", "relax outside the basis", trains="lora"),
        _LORA,
        _with_every_loss(_LORA),
        _DREAMBOOTH,
        _with_every_loss(_DREAMBOOTH),
        Contender("inversion", "Textual Inversion", "inversion", 5000, 5e-3),
    )
}


def choose(names: Sequence[str], most: int | None = None) -> list[Contender]:
    """Return the contenders of these names, NAME, NAME@STEPS or NAME:PEOPLE, with at most so many
    steps; HdbError for unknown names."""
    chosen: dict[str, Contender] = {}
    for each in names:
        whole, _, people = each.partition(":")
        name, at, schedule = whole.partition("@")
        if name not in CONTENDERS:
            raise HdbError(f"unknown method {name!r}; choose from {', '.join(CONTENDERS)}")
        if people and not (people.isdecimal() and int(people)):
            raise HdbError(f"{each!r}: expected NAME or NAME:PEOPLE, e.g. {name}:12")
        if whole in chosen:
            raise HdbError(f"method {whole} comes twice; name it once, with its people or without")
        contender = CONTENDERS[name]
        if at:
            if not (schedule.isdecimal() and int(schedule) and contender.steps):
                raise HdbError(
                    f"{each!r}: expected NAME@STEPS of a method that trains, as lora@400"
                )
            contender = contender.of_steps(int(schedule))
        steps = contender.steps if most is None else min(contender.steps, most)
        people_wanted = int(people) if people else None
        chosen[whole] = replace(contender, steps=steps, people=people_wanted)
    return list(chosen.values())


def suited(contender: Contender, base: Base, most: int | None = None) -> Contender:
    """Give HyperDreamBooth and its ablations what `hdb new` would give them on this base: the rank
    that the budget of bytes allows, the rate where nothing is drawn for likeness, and on a base
    without a hypernetwork the iterations of a start from scratch, at most so many."""
    if not contender.steps or not (contender.predicted or contender.trains == "lidb"):
        return contender
    new = settle(base, None, None, RefineConfig.seed, contender.optimizer, contender.likeness)
    contender = replace(contender, rank=min(contender.rank, new.rank))
    if contender.predicted:
        return replace(contender, lr=min(contender.lr, new.lr))
    return replace(contender, steps=new.steps if most is None else min(new.steps, most))


@contextmanager
def entered(
    contender: Contender,
    base: Base,
    model: HyperNetwork | None,
    faces: Sequence[Faces],
    tell: Tell,
) -> Iterator[Trial]:
    """Make the trial of P people from the faces on their photos; the base is itself afterwards.

    Only methods that start from a prediction need the hypernetwork.
    """
    if contender.trains == "dreambooth":
        with dreambooth_trial(base, _prior(contender, base, tell)) as trial:
            yield _drawn(contender, base, trial, faces)
    elif contender.trains == "inversion":
        yield inversion_trial(base, len(faces))
    elif contender.trains == "lora":
        beneath = _start(contender, base, model, faces) if contender.predicted else None
        trial = lora_trial(base, len(faces), contender.rank, beneath)
        if contender.class_pictures:
            trial = replace(trial, prior=_prior(contender, base, tell))
        yield _drawn(contender, base, trial, faces)
    else:
        trial = lidb_trial(base, relax(_start(contender, base, model, faces), contender.rank))
        yield _drawn(contender, base, trial, faces)


def _prior(
    contender: Contender, base: Base, tell: Tell
) -> Callable[[torch.Generator, int], Samples]:
    prompts = CLASS_PROMPTS[: contender.class_prompts]
    return class_prior(base, contender.class_pictures, prompts, tell)


def _drawn(contender: Contender, base: Base, trial: Trial, faces: Sequence[Faces]) -> Trial:
    """Let a trial of any steps learn from what it draws, as its contender weighs it."""
    if not contender.steps:
        return trial
    how = contender.likeness, contender.predicted, contender.preserves
    return with_losses(base, trial, faces, *how)


@torch.no_grad()
def _start(
    contender: Contender, base: Base, model: HyperNetwork | None, faces: Sequence[Faces]
) -> Theta:
    """Predict each person's theta, or take theta_0."""
    if not contender.predicted:
        return base.first_theta(people=len(faces))
    assert model is not None, f"{contender.name} starts from a prediction"
    return stack([model.predict(each, contender.iterations) for each in faces])
