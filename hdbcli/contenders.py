"""Who competes in `hdb compare`: HyperDreamBooth, its ablations, and the methods beside it, as
data.

HyperDreamBooth table 1 and table 2. One loop trains them all with one batch size; they differ in
what is trained, from where, how long and how fast.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch

from hdbcli.base import Base
from hdbcli.config import RefineConfig, Tell
from hdbcli.errors import HdbError
from hdbcli.hypernet import Faces, HyperNetwork
from hdbcli.lidb import Theta, first_theta
from hdbcli.methods import class_latents, dreambooth_trial, inversion_trial, lora_trial
from hdbcli.refine import Trial, lidb_trial
from hdbcli.relax import relax


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
    people: int | None = None  # learns only the first so many

    @property
    def at_once(self) -> int:
        """How many people can learn side by side; DreamBooth changes the base, so one."""
        return 1 if self.trains == "dreambooth" else 25


_DEFAULT = RefineConfig()
_HDB = ("lidb", _DEFAULT.steps, _DEFAULT.lr, _DEFAULT.rank)

CONTENDERS = {
    contender.name: contender
    for contender in (
        Contender("hyperdreambooth", "predict, relax, 40 iterations", *_HDB, predicted=True),
        Contender("no-hypernetwork", "theta_0, 40 iterations", *_HDB[:2], 5e-3, _DEFAULT.rank),
        Contender("hypernetwork-only", "predict", "lidb", 0, 0.0, 1, predicted=True),
        Contender("one-pass", "predict with k = 1", *_HDB, predicted=True, iterations=1),
        Contender("no-relaxation", "predict, 40 iterations at rank 1", *_HDB[:3], 1, True),
        Contender("free-relaxation", "relax outside the basis", "lora", *_HDB[1:], predicted=True),
        Contender("lora", "LoRA DreamBooth", "lora", 1200, 1e-3),
        Contender("dreambooth", "all weights, prior preservation", "dreambooth", 1200, 5e-5),
        Contender("dreambooth-400", "the same, aggressive", "dreambooth", 400, 1e-4),
        Contender("dreambooth-40", "the same, very aggressive", "dreambooth", 40, 3e-4),
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
        contender = replace(CONTENDERS[name], people=int(people) if people else None)
        steps = contender.steps if most is None else min(contender.steps, most)
        chosen.setdefault(name, replace(contender, steps=steps))
    return list(chosen.values())


@contextmanager
def entered(
    contender: Contender, base: Base, model: HyperNetwork, faces: Sequence[Faces], tell: Tell
) -> Iterator[Trial]:
    """Make the trial of P people from the faces on their photos; the base is itself afterwards."""
    if contender.trains == "dreambooth":
        with dreambooth_trial(base, class_latents(base, contender.class_pictures, tell)) as trial:
            yield trial
    elif contender.trains == "inversion":
        yield inversion_trial(base, len(faces))
    elif contender.trains == "lora":
        beneath = _start(contender, base, model, faces) if contender.predicted else None
        yield lora_trial(base, len(faces), contender.rank, beneath)
    else:
        yield lidb_trial(base, relax(_start(contender, base, model, faces), contender.rank))


@torch.no_grad()
def _start(contender: Contender, base: Base, model: HyperNetwork, faces: Sequence[Faces]) -> Theta:
    """Predict everybody's theta, or take theta_0."""
    if not contender.predicted:
        first = first_theta(len(base.injected.layers), base.spec.a, base.spec.b)
        expanded = (core.expand(len(faces), -1, -1, -1) for core in (first.down, first.up))
        return Theta(*(core.to(base.device) for core in expanded))
    thetas = [model.predict(each, contender.iterations) for each in faces]
    return Theta(torch.cat([t.down for t in thetas]), torch.cat([t.up for t in thetas]))
