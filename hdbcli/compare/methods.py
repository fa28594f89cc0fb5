"""Who competes in `hdb compare`: HyperDreamBooth, its ablations, and the methods beside it, as
data.

HyperDreamBooth table 1 and table 2. One loop trains them all with one batch size; they differ in
what is trained, from where, how long and how fast.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch

from hdbcli.compare.baselines import class_latents, dreambooth_trial, inversion_trial, lora_trial
from hdbcli.config import DIFFUSION_LR, RefineConfig, Tell
from hdbcli.errors import HdbError
from hdbcli.method.hypernet import Faces, HyperNetwork
from hdbcli.method.lidb import Theta
from hdbcli.method.relax import relax, stack
from hdbcli.model.base import Base
from hdbcli.training.personalise import settle
from hdbcli.training.refine import Trial, lidb_trial, with_likeness


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
    class_pictures: int = 32  # DreamBooth's prior, which the base draws
    optimizer: str = RefineConfig.optimizer
    likeness: float | None = 0.0  # weight of what is drawn, None is the base's own
    people: int | None = None  # learns only the first so many

    def at_once(self, side: int) -> int:
        """Return how many people learn side by side on a base that draws `side` pixels: 25 of 128,
        one of 512. DreamBooth changes the base, so one."""
        return 1 if self.trains == "dreambooth" else max(1, 25 * 128**2 // side**2)


_FULL = Contender(
    "hyperdreambooth",
    "predict, relax, 40 iterations",
    "lidb",
    RefineConfig.steps,
    RefineConfig.lr,
    predicted=True,
    likeness=None,
)


def _without(name: str, summary: str, **changes: Any) -> Contender:
    return replace(_FULL, name=name, summary=summary, **changes)


def _dreambooth(name: str, summary: str, steps: int, lr: float) -> Contender:
    """Of all weights the 8-bit optimizer would be the slower one on a CPU."""
    return Contender(name, summary, "dreambooth", steps, lr, optimizer="adamw")


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
        Contender("lora", "LoRA DreamBooth", "lora", 1200, 1e-3),
        _dreambooth("dreambooth", "all weights, prior preservation", 1200, 1.5e-4),
        _dreambooth("dreambooth-400", "the same, 400 steps", 400, 1e-4),
        _dreambooth("dreambooth-40", "the same, 40 steps", 40, 3e-4),
        Contender("inversion", "Textual Inversion", "inversion", 5000, 5e-3),
    )
}


def choose(names: Sequence[str], most: int | None = None) -> list[Contender]:
    """Return the contenders of these names, NAME or NAME:PEOPLE, with at most so many steps;
    HdbError for unknown names."""
    chosen: dict[str, Contender] = {}
    for each in names:
        name, _, people = each.partition(":")
        if name not in CONTENDERS:
            raise HdbError(f"unknown method {name!r}; choose from {', '.join(CONTENDERS)}")
        if people and not (people.isdecimal() and int(people)):
            raise HdbError(f"{each!r} asks for no number of people; write {name}:12")
        if name in chosen:
            raise HdbError(f"method {name} comes twice; name it once, with its people or without")
        contender = replace(CONTENDERS[name], people=int(people) if people else None)
        steps = contender.steps if most is None else min(contender.steps, most)
        chosen[name] = replace(contender, steps=steps)
    return list(chosen.values())


def suited(contender: Contender, base: Base, most: int | None = None) -> Contender:
    """Give HyperDreamBooth and its ablations what `hdb new` would give them on this base: the rank
    that the budget of bytes allows, the rate where nothing is drawn for likeness, and on a base
    without a hypernetwork the iterations of a start from nobody, at most so many."""
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
        with dreambooth_trial(base, class_latents(base, contender.class_pictures, tell)) as trial:
            yield trial
    elif contender.trains == "inversion":
        yield inversion_trial(base, len(faces))
    elif contender.trains == "lora":
        beneath = _start(contender, base, model, faces) if contender.predicted else None
        trial = lora_trial(base, len(faces), contender.rank, beneath)
        yield _drawn(contender, base, trial, faces)
    else:
        trial = lidb_trial(base, relax(_start(contender, base, model, faces), contender.rank))
        yield _drawn(contender, base, trial, faces)


def _drawn(contender: Contender, base: Base, trial: Trial, faces: Sequence[Faces]) -> Trial:
    """Let a trial of any steps learn from what it draws, as its contender weighs it."""
    if not contender.steps:
        return trial
    return with_likeness(base, trial, faces, contender.likeness, contender.predicted)


@torch.no_grad()
def _start(
    contender: Contender, base: Base, model: HyperNetwork | None, faces: Sequence[Faces]
) -> Theta:
    """Predict everybody's theta, or take theta_0."""
    if not contender.predicted:
        return base.first_theta(people=len(faces))
    assert model is not None, f"{contender.name} starts from a prediction"
    return stack([model.predict(each, contender.iterations) for each in faces])
