"""Benchmarks of identities made from identities, on held-out people: does 8 bits cost likeness, do
walks go straight?"""

from __future__ import annotations

import tempfile
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

from hdbcli.bench.harness import Row
from hdbcli.config import PORTRAIT, Tell
from hdbcli.faces.embedding import embed
from hdbcli.identity.file import Identity, facts_of, load, save
from hdbcli.identity.interpolation import walk
from hdbcli.measure.metrics import FaceMetric
from hdbcli.method.algebra import stack
from hdbcli.method.lidb import Theta
from hdbcli.model.base import Base, load_predictor, open_base
from hdbcli.model.sample import generate
from hdbcli.training.evaluate import refine_all
from hdbcli.training.people import read_people
from registry.errors import HdbError

BASE = "tiny"
PEOPLE, PAIRS = 50, 20
SEEDS = 4  # pictures of a step of a walk


def run(folder: Path | None, tell: Tell) -> list[Row]:
    """Make each person's identity as `hdb new` does; DATA has a folder of photos a person."""
    if folder is None:
        raise HdbError("benchmark derived needs people; give --people tests/data/heldout")
    base = open_base(BASE)
    model, _ = load_predictor(base)
    people = read_people(folder, base.spec, "*", False, tell).first(PEOPLE)
    if len(people.names) < 2:
        raise HdbError(f"{folder} holds {len(people.names)} usable people; two are needed")
    read = people.crops[[photos[0] for photos in people.members]]
    truth = embed([people.crops[photos[-1]] for photos in people.members])
    faces = base.faces(list(read))
    with torch.no_grad():
        predicted = model(faces)
    theta = refine_all(base, predicted, faces, tell)
    count = len(theta)
    whole, small = (
        float(FaceMetric().likeness(_portraits(base, adapter, tell).numpy(), truth.numpy()).mean())
        for adapter in (theta, _stored(base, theta, "int8"))
    )
    pairs = list(pairwise(range(min(count, PAIRS + 1))))
    orders = [_order(base, theta, truth, pair, tell) for pair in pairs]
    return [
        Row(f"likeness of {count} people", whole, ""),
        Row("likeness as int8 / as float32", small / whole, "x", above=0.98),
        Row(
            f"walks of {len(pairs)} pairs: Spearman of step and place, mean",
            sum(orders) / len(orders),
            "",
            above=0.9,
        ),
        Row("the same, lowest", min(orders), ""),
    ]


def _portraits(base: Base, theta: Theta, tell: Tell) -> Tensor:
    drawn = generate(base, theta, PORTRAIT, list(range(len(theta))), base.spec.sampling, tell)
    return embed([picture.image for picture in drawn])


def _stored(base: Base, theta: Theta, dtype: str) -> Theta:
    """Send all people through a file of this number format."""
    back, facts = [], facts_of(base.spec, base.injected)
    with tempfile.TemporaryDirectory() as folder:
        for k in range(len(theta)):
            file = Path(folder) / f"{k}.safetensors"
            save(Identity(facts, theta.down[k].cpu(), theta.up[k].cpu()), file, dtype)
            back.append(load(file).theta)
    return stack(back).to(base.device)


def _order(base: Base, theta: Theta, truth: Tensor, pair: tuple[int, int], tell: Tell) -> float:
    """Return how well the steps of a walk lie in order on the line between two true faces."""
    first, last = pair
    steps = walk([theta[first : first + 1], theta[last : last + 1]])
    adapter = steps[[k for k in range(len(steps)) for _ in range(SEEDS)]]
    seeds = list(range(SEEDS)) * len(steps)
    drawn = generate(base, adapter, PORTRAIT, seeds, base.spec.sampling, tell)
    faces = embed([picture.image for picture in drawn]).view(len(steps), SEEDS, -1).nanmean(1)
    return spearman(faces @ (truth[last] - truth[first]))


def spearman(values: Tensor) -> float:
    """Return the rank correlation of values (N,) with their places 0..N-1."""
    ranks = values.argsort().argsort().double()
    places = torch.arange(len(values)).double()
    return float(torch.corrcoef(torch.stack([ranks, places]))[0, 1])
