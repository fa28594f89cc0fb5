"""Walk from one identity to the next and draw every step, all in one pass: what composing does."""

from __future__ import annotations

from collections.abc import Sequence
from io import BytesIO

import numpy as np
from PIL import Image

from hdbcli.config import CAPTIONS, PORTRAIT, Tell
from hdbcli.method.algebra import compose, stack
from hdbcli.method.lidb import Theta
from hdbcli.model import sample
from hdbcli.model.base import Base
from hdbcli.model.contact_sheet import in_rows
from registry.errors import UsageError

COLUMNS = 7  # from one identity to the next, both included
ROWS = (PORTRAIT, CAPTIONS[1])
END, STEP = 1000, 250  # milliseconds
SEED = 0  # one for all: what differs between two pictures of a row is the person


def weights_of(people: int, columns: int = COLUMNS) -> list[list[float]]:
    """Return the weights of each step: from each of the people to the next, moving linearly.

    n people make (n - 1) (columns - 1) + 1 steps; in every one the weights add up to 1.
    """
    if people < 2:
        raise UsageError("a walk needs two identities or more; give another, or leave --show out")
    steps = (people - 1) * (columns - 1)
    places = [step * (people - 1) / steps for step in range(steps + 1)]
    return [[max(0.0, 1 - abs(place - person)) for person in range(people)] for place in places]


def walk(thetas: Sequence[Theta]) -> Theta:
    """Return a batch with one composed identity a step."""
    here = [theta.to("cpu") for theta in thetas]  # composing takes float64, which MPS lacks
    steps = [compose(here, weights) for weights in weights_of(len(here))]
    return stack(steps).to(thetas[0].down.device)


def draw(base: Base, thetas: Sequence[Theta], tell: Tell) -> list[Sequence[np.ndarray]]:
    """Draw the walk, a column a step and a row a prompt. Every picture is a sample of its own, so
    that one pass draws all that fit in it."""
    steps = walk(thetas)
    columns = len(steps)
    adapter = steps[[column for _ in ROWS for column in range(columns)]]
    prompts = [prompt for prompt in ROWS for _ in range(columns)]
    settings = base.spec.sampling
    pictures = sample.generate(base, adapter, prompts, [SEED] * len(prompts), settings, tell)
    return in_rows([picture.image for picture in pictures], columns)


def animation(rows: Sequence[Sequence[np.ndarray]]) -> bytes:
    """Return the walk there and back as an animated WebP, each step with its prompts side by side;
    it rests at both ends. Lossless, since the lossy coder drops small steps."""
    first, *rest = (Image.fromarray(np.hstack(step)) for step in zip(*rows, strict=True))
    back, between = rest[-2::-1], [STEP] * (len(rest) - 1)
    file = BytesIO()
    first.save(
        file,
        "WEBP",
        save_all=True,
        append_images=[*rest, *back],
        duration=[END, *between, END, *between],
        loop=0,
        lossless=True,
    )
    return file.getvalue()
