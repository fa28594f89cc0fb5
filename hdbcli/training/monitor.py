"""Watch a hypernetwork learn: losses and portraits of people it does not train on, as a log and
a picture.

Three curves of the loss show whether it knows its people: with their own theta, with another
person's, with the base model alone. Own below another's is the person; own below the base model's
alone could be the mere look of the photos.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from hdbcli.config import PORTRAIT, Tell
from hdbcli.measure.plot import Axes, Curve, save_chart
from hdbcli.method.hypernet import HyperNetwork
from hdbcli.model.base import Base
from hdbcli.model.sample import generate
from hdbcli.training.evaluate import person_losses
from hdbcli.training.loop import Step
from hdbcli.training.people import People
from registry.errors import HdbError
from registry.files import write_beside

if TYPE_CHECKING:
    from accelerate.tracking import GeneralTracker

LOGGED = 10  # steps
PAIRS = 8  # (timestep, noise) pairs
SHOWN = 6  # people in the picture
AXES = Axes('diffusion loss of "a [V] face", held-out people', "steps", "loss")


@dataclass(frozen=True)
class Look:
    """The losses at one step: of the training since the look before, and of the held-out people."""

    step: int
    training: float
    own: float
    another: float
    base: float


class Watch:
    """Looks at a hypernetwork now and then; `OUT-run.jsonl` and `OUT-run.png` are whole at
    any time."""

    def __init__(
        self, base: Base, people: People, out: Path, tell: Tell, tracker: GeneralTracker | None
    ) -> None:
        self.base, self.tell, self.tracker = base, tell, tracker
        self.log = out.with_name(f"{out.stem}-run.jsonl")
        self.picture = out.with_name(f"{out.stem}-run.png")
        # The photo that is read and the one that is tested on; with one photo they are the same.
        self.read = people.crops[[photos[0] for photos in people.members]]
        assert people.latents is not None
        tested = people.latents[[photos[-1] for photos in people.members]][:, 0]
        self.latents = torch.from_numpy(tested).float().to(base.device)
        self.plain = float(person_losses(base, None, self.latents, tell, PAIRS).mean())

    def look(self, step: int, training: float, model: HyperNetwork) -> Look:
        """Measure, draw, and write both files anew; looks at later steps, of a run cut off, go."""
        with torch.no_grad():
            theta = model(self.base.faces(list(self.read)))
        turned = theta[torch.arange(len(theta)).roll(1)]
        own, another = (
            float(person_losses(self.base, adapter, self.latents, self.tell, PAIRS).mean())
            for adapter in (theta, turned)
        )
        now = Look(step, training, own, another, self.plain)
        looks = [*(past for past in read_looks(self.log) if past.step < step), now]
        lines = "".join(json.dumps(asdict(each)) + "\n" for each in looks)
        with write_beside(self.log) as beside:
            beside.write_text(lines)
        settings = self.base.spec.sampling
        shown = theta[:SHOWN]
        drawn = generate(self.base, shown, PORTRAIT, list(range(len(shown))), settings, self.tell)
        with write_beside(self.picture) as beside:
            rows = [list(self.read[:SHOWN]), [each.image for each in drawn]]
            save_chart(AXES, _curves(looks), rows, beside)
        if self.tracker:
            told = {f"held out: {key}": getattr(now, key) for key in ("own", "another", "base")}
            self.tracker.log(told, step=step)
        return now


def open_tracker(name: str, run: Path, facts: Mapping[str, object]) -> GeneralTracker:
    """Open a tracker that accelerate knows, such as TensorBoard, for the curves of a run.

    HdbError if its package is not installed.
    """
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

    if name not in [str(each) for each in get_available_trackers()]:
        raise HdbError(f"{name} is not installed; pip install {name}, or drop --track")
    kind = LOGGER_TYPE_TO_CLASS[name]
    place = {"logging_dir": run.parent} if kind.requires_logging_directory else {}
    tracker = kind(run.name, **place)
    tracker.start()
    plain = {key: value for key, value in facts.items() if isinstance(value, str | int | float)}
    tracker.store_init_configuration(plain)
    return tracker


def tracked(steps: Iterator[Step], tracker: GeneralTracker) -> Iterator[Step]:
    """Log the mean loss of every LOGGED steps, and how many steps a second there were."""
    losses: list[float] = []
    last = time.perf_counter()
    try:
        for step in steps:
            losses.append(step.loss)
            if step.number % LOGGED == 0 or step.number == step.steps:
                now = time.perf_counter()
                rate = len(losses) / (now - last)
                values = {"loss": sum(losses) / len(losses), "steps a second": rate}
                tracker.log(values, step=step.number)
                losses, last = [], now
            yield step
    finally:
        tracker.finish()


def read_looks(log: Path) -> list[Look]:
    """Read the log of a run, leaving out lines that are not looks; none without a log."""
    looks = []
    for line in log.read_text().splitlines() if log.exists() else ():
        try:
            looks.append(Look(**json.loads(line)))
        except (ValueError, TypeError):
            continue
    return looks


def _curves(looks: Sequence[Look]) -> list[Curve]:
    steps = [look.step for look in looks]
    return [
        Curve("another's theta", steps, [look.another for look in looks]),
        Curve("base model", steps, [look.base for look in looks]),
        Curve("their own theta", steps, [look.own for look in looks]),
    ]
