"""Walk from one identity to the next and draw every step, all in one pass: what composing does."""

from __future__ import annotations

from collections.abc import Sequence

from hdbcli.config import CAPTIONS, PORTRAIT, Tell
from hdbcli.method.algebra import compose
from hdbcli.method.lidb import Theta
from hdbcli.method.relax import stack
from hdbcli.model import sample
from hdbcli.model.base import Base
from hdbcli.model.contact_sheet import contact_sheet, in_rows
from hdbcli.model.memory import Work
from hdbcli.model.sample import Picture
from registry.errors import HdbError
from registry.spec import BaseSpec

COLUMNS = 7  # from one identity to the next, both included
ROWS = (PORTRAIT, CAPTIONS[1])
SEED = 0  # one for all: what differs between two pictures of a row is the person


def weights_of(people: int, columns: int = COLUMNS) -> list[list[float]]:
    """Return the weights of each step: from each of the people to the next, moving linearly.

    n people make (n - 1) (columns - 1) + 1 steps; in every one the weights add up to 1.
    """
    if people < 2:
        raise HdbError("a walk needs two identities or more; give another, or leave --show out")
    steps = (people - 1) * (columns - 1)
    places = [step * (people - 1) / steps for step in range(steps + 1)]
    return [[max(0.0, 1 - abs(place - person)) for person in range(people)] for place in places]


def walk(thetas: Sequence[Theta]) -> Theta:
    """Return a batch with one composed identity a step."""
    here = [theta.to("cpu") for theta in thetas]  # composing takes float64, which MPS lacks
    steps = [compose(here, weights) for weights in weights_of(len(here))]
    return stack(steps).to(thetas[0].down.device)


def work_of(spec: BaseSpec, people: int) -> Work:
    """Say what drawing the walk through so many people asks of a base."""
    return sample.work_of(len(ROWS) * len(weights_of(people)), spec.resolution)


def draw(base: Base, thetas: Sequence[Theta], tell: Tell) -> Picture:
    """Draw the walk as one sheet, a column a step and a row a prompt; every picture of the sheet
    is a sample of its own, so that one pass draws all that fit in it."""
    steps = walk(thetas)
    columns = len(steps)
    adapter = steps[[column for _ in ROWS for column in range(columns)]]
    prompts = [prompt for prompt in ROWS for _ in range(columns)]
    settings = base.spec.sampling
    pictures = sample.generate(base, adapter, prompts, [SEED] * len(prompts), settings, tell)
    rows = in_rows([picture.image for picture in pictures], columns)
    return Picture(contact_sheet(rows), SEED)
