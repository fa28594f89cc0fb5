"""The methods of `hdb compare` as data: HyperDreamBooth, its ablations, and other methods.

HyperDreamBooth table 1 and table 2. One loop trains them all with one batch size; they differ in
what is trained, from where, how long and how fast.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import torch

from hdbcli.compare.baselines import (
    CLASS_PROMPTS,
    class_prior,
    trainable_dreambooth,
    trainable_inversion,
    trainable_lora,
)
from hdbcli.config import DIFFUSION_LR, RefineConfig, Tell
from hdbcli.method.algebra import relax, stack
from hdbcli.method.hypernet import Faces, HyperNetwork
from hdbcli.method.lidb import Theta
from hdbcli.model.base import Base
from hdbcli.training.personalise import settle
from hdbcli.training.questions import Samples
from hdbcli.training.refine import Trainable, trainable_lidb, with_losses
from registry.errors import UsageError

# (method, base, hypernetwork, the faces on P people's photos, tell) -> what the method trains for
# them; afterwards the base is as it was. Only a method that starts from a prediction needs the
# hypernetwork.
Trains: TypeAlias = Callable[
    ["Method", Base, HyperNetwork | None, Sequence[Faces], Tell], AbstractContextManager[Trainable]
]


@dataclass(frozen=True)
class Method:
    """One method: what it trains, and its defaults."""

    name: str
    summary: str
    trains: Trains  # lidb, lora, inversion or dreambooth, below
    steps: int
    lr: float
    rank: int = RefineConfig.rank
    predicted: bool = False  # starts from the hypernetwork, or rests on it
    iterations: int | None = None  # of the hypernetwork's decoder; None is all of them
    class_pictures: int = 0  # of a prior, which the base draws
    class_prompts: int = 1  # "a face" alone, or with styles of it
    optimizer: str = RefineConfig.optimizer
    likeness: float | None = 0.0  # weight of what is drawn, None is the base's own
    preserves: bool = False  # holds answers to other prompts, without pictures of a class
    rates: tuple[tuple[int, float], ...] = ()  # (steps, lr) of other schedules
    people: int | None = None  # learns only the first ones

    @contextmanager
    def prepared(
        self, base: Base, model: HyperNetwork | None, faces: Sequence[Faces], tell: Tell
    ) -> Iterator[Trainable]:
        """Yield what the method trains for the people on these photos, see `Trains`, with the other
        losses as it weighs them, where it takes steps."""
        with self.trains(self, base, model, faces, tell) as trainable:
            if self.steps:
                how = self.likeness, self.predicted, self.preserves
                trainable = with_losses(base, trainable, faces, *how)
            yield trainable

    @property
    def family(self) -> str:
        """Return the method's name without its schedule: what NAME@STEPS have in common."""
        return self.name.partition("@")[0]

    def of_steps(self, steps: int) -> Method:
        """Return the method with a whole schedule of `steps` steps, at the rate of the schedule
        nearest in length that has one."""
        known = (*self.rates, (self.steps, self.lr))
        _, rate = min(known, key=lambda one: abs(math.log(max(one[0], 1) / steps)))
        return replace(self, name=f"{self.family}@{steps}", steps=steps, lr=rate)

    def at_once(self, side: int) -> int:
        """Return how many people learn side by side on a base that draws `side` pixels: 25 of 128,
        one of 512. With pictures of the class one: they are one person's prior."""
        return 1 if self.class_pictures else max(1, 25 * 128**2 // side**2)


def _prior(method: Method, base: Base, tell: Tell) -> Callable[[torch.Generator, int], Samples]:
    prompts = CLASS_PROMPTS[: method.class_prompts]
    return class_prior(base, method.class_pictures, prompts, tell)


@torch.no_grad()
def _start(method: Method, base: Base, model: HyperNetwork | None, faces: Sequence[Faces]) -> Theta:
    """Predict each person's theta, or take theta_0."""
    if not method.predicted:
        return base.first_theta(people=len(faces))
    assert model is not None, f"{method.name} starts from a prediction"
    return stack([model.predict(each, method.iterations) for each in faces])


@contextmanager
def lidb(
    method: Method, base: Base, model: HyperNetwork | None, faces: Sequence[Faces], tell: Tell
) -> Iterator[Trainable]:
    """Train the cores of a LiDB."""
    yield trainable_lidb(base, relax(_start(method, base, model, faces), method.rank))


@contextmanager
def lora(
    method: Method, base: Base, model: HyperNetwork | None, faces: Sequence[Faces], tell: Tell
) -> Iterator[Trainable]:
    """Train plain factors, on top of the prediction if the method starts from it."""
    beneath = _start(method, base, model, faces) if method.predicted else None
    trainable = trainable_lora(base, len(faces), method.rank, beneath)
    if method.class_pictures:
        trainable = replace(trainable, prior=_prior(method, base, tell))
    yield trainable


@contextmanager
def inversion(
    method: Method, base: Base, model: HyperNetwork | None, faces: Sequence[Faces], tell: Tell
) -> Iterator[Trainable]:
    """Train the rare token's vectors."""
    yield trainable_inversion(base, len(faces))


@contextmanager
def dreambooth(
    method: Method, base: Base, model: HyperNetwork | None, faces: Sequence[Faces], tell: Tell
) -> Iterator[Trainable]:
    """Train all weights of the base."""
    with trainable_dreambooth(base, _prior(method, base, tell)) as trainable:
        yield trainable


_FULL = Method(
    "hyperdreambooth",
    "predict, relax, 40 iterations",
    lidb,
    RefineConfig.steps,
    RefineConfig.lr,
    predicted=True,
    likeness=None,
    preserves=True,
)


def _without(name: str, summary: str, **changes: Any) -> Method:
    return replace(_FULL, name=name, summary=summary, **changes)


# Of all weights the 8-bit optimizer would be the slower one on a CPU.
_LORA = Method("lora", "LoRA DreamBooth", lora, 1200, 1e-3)
_DREAMBOOTH = Method(
    "dreambooth",
    "all weights, prior preservation",
    dreambooth,
    1200,
    1.5e-4,
    class_pictures=32,
    optimizer="adamw",
    rates=((40, 3e-4), (100, 5e-4), (400, 1e-4)),
)


def _with_every_loss(method: Method, lr: float) -> Method:
    """Give a method the losses that HyperDreamBooth has here: likeness, and pictures without [V]
    held as they were, in styles too; and a rate of its own, since likeness bears a higher one."""
    return replace(
        method,
        name=f"{method.name}-all",
        summary=f"{method.summary}, every loss of hdb",
        lr=lr,
        rates=(),
        likeness=None,
        class_pictures=8 * len(CLASS_PROMPTS),
        class_prompts=len(CLASS_PROMPTS),
    )


METHODS = {
    method.name: method
    for method in (
        _FULL,
        _without("no-hypernetwork", "theta_0, 40 iterations", lr=5e-3, predicted=False),
        _without("hypernetwork-only", "predict", steps=0, lr=0.0, rank=1),
        _without("one-pass", "predict with k = 1", iterations=1),
        _without("no-relaxation", "predict, 40 iterations at rank 1", rank=1),
        _without(
            "no-likeness", "40 iterations of the diffusion loss", lr=DIFFUSION_LR, likeness=0.0
        ),
        _without("free-relaxation", "relax outside the basis", trains=lora),
        _LORA,
        _with_every_loss(_LORA, 1e-2),
        _DREAMBOOTH,
        _with_every_loss(_DREAMBOOTH, 1.5e-4),
        Method("inversion", "Textual Inversion", inversion, 5000, 5e-3),
    )
}


def choose(names: Sequence[str], most: int | None = None) -> list[Method]:
    """Return the methods of these names, NAME, NAME@STEPS or NAME:PEOPLE, with at most `most`
    steps; HdbError for unknown names."""
    chosen: dict[str, Method] = {}
    for each in names:
        whole, _, people = each.partition(":")
        name, at, schedule = whole.partition("@")
        if name not in METHODS:
            raise UsageError(f"unknown method {name!r}; choose from {', '.join(METHODS)}")
        if people and not (people.isdecimal() and int(people)):
            raise UsageError(f"{each!r}: expected NAME or NAME:PEOPLE, e.g. {name}:12")
        if whole in chosen:
            raise UsageError(
                f"method {whole} comes twice; name it once, with its people or without"
            )
        method = METHODS[name]
        if at:
            if not (schedule.isdecimal() and int(schedule) and method.steps):
                raise UsageError(
                    f"{each!r}: expected NAME@STEPS of a method that trains, as lora@400"
                )
            method = method.of_steps(int(schedule))
        steps = method.steps if most is None else min(method.steps, most)
        people_wanted = int(people) if people else None
        chosen[whole] = replace(method, steps=steps, people=people_wanted)
    return list(chosen.values())


def suited(method: Method, base: Base, most: int | None = None) -> Method:
    """Give HyperDreamBooth and its ablations what `hdb new` would give them on this base: the rank
    that the budget of bytes allows, the rate where nothing is drawn for likeness, and on a base
    without a hypernetwork the iterations of a start from scratch, at most `most`."""
    if not method.steps or not (method.predicted or method.trains is lidb):
        return method
    new = settle(base, None, None, RefineConfig.seed, method.optimizer, method.likeness)
    method = replace(method, rank=min(method.rank, new.rank))
    if method.predicted:
        return replace(method, lr=min(method.lr, new.lr))
    return replace(method, steps=new.steps if most is None else min(new.steps, most))
