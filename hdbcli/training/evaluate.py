"""Measure a hypernetwork on people it never saw: three losses with intervals, and retrieval
of portraits."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from hdbcli.config import PORTRAIT, RefineConfig, Tell
from hdbcli.faces.embedding import embed
from hdbcli.measure.statistics import Interval, Retrieval, normal_interval, retrieval
from hdbcli.method.algebra import relax, stack
from hdbcli.method.hypernet import Faces, HyperNetwork
from hdbcli.method.lidb import Theta
from hdbcli.model.base import Base
from hdbcli.model.memory import Work
from hdbcli.model.sample import generate
from hdbcli.training import personalise
from hdbcli.training.people import People
from hdbcli.training.refine import portrait_loss, refine
from registry.errors import HdbError
from registry.spec import BaseSpec

PAIRS = 32  # (timestep, noise) pairs
AT_ONCE = 25  # people side by side; one where memory is small


@dataclass(frozen=True)
class Evaluation:
    """Held-out losses and retrieval; retrieval's chance is 1 / people."""

    people: int
    own: float
    another: float
    base: float
    base_minus_own: Interval
    another_minus_own: Interval
    portraits: Retrieval
    refined: Retrieval | None  # the first `refined_people`, among all
    refined_people: int
    other_photo: Retrieval
    autoencoded: Retrieval


def work_of(spec: BaseSpec, refined: int) -> Work:
    """Say what evaluating asks of a base: what `hdb new` does, for many people at once if the plan
    allows, and unrounded, since the losses differ by little."""
    alone = personalise.work_of(spec, refined > 0, None)
    return replace(alone, samples=AT_ONCE * alone.samples, trains=True, exact=True)


def evaluate(
    base: Base, model: HyperNetwork, people: People, refined: int, tell: Tell
) -> Evaluation:
    """Predict each person from their first photo and test on their second, which nothing has read.

    `refined` people are also relaxed, refined with the defaults and drawn (0: none).
    """
    if len(people.names) < 2 or any(len(m) < 2 for m in people.members):
        raise HdbError("evaluation needs at least two people with two usable photos each")
    if refined == 1:
        raise HdbError(
            "one refined person has no other to be told from; refine 0 people, or two or more"
        )
    refined = min(refined, len(people.names))
    assert people.latents is not None
    given, kept_back = ([m[k] for m in people.members] for k in range(2))
    first, second = people.crops[given], people.crops[kept_back]
    latents = torch.from_numpy(people.latents[kept_back][:, 0]).float().to(base.device)
    faces = base.faces(list(first))
    with torch.no_grad():
        theta = model(faces)
    others = Theta(theta.down.roll(1, 0), theta.up.roll(1, 0))
    own, another, none = (
        person_losses(base, adapter, latents, tell) for adapter in (theta, others, None)
    )
    gallery = embed(list(second))
    more = None
    if refined:
        final = refine_all(base, theta[:refined], faces, tell)
        more = _retrieval_of(base, final, gallery, tell)
    return Evaluation(
        people=len(people.names),
        own=float(own.mean()),
        another=float(another.mean()),
        base=float(none.mean()),
        base_minus_own=normal_interval(none - own),
        another_minus_own=normal_interval(another - own),
        portraits=_retrieval_of(base, theta, gallery, tell),
        refined=more,
        refined_people=refined,
        other_photo=retrieval(embed(list(first)), gallery),
        autoencoded=retrieval(embed(base.through_autoencoder(list(first))), gallery),
    )


def person_losses(
    base: Base, theta: Theta | None, latents: Tensor, tell: Tell, pairs: int = PAIRS
) -> Tensor:
    """Return the loss (P,) of each person's one photo (P, c, h, w), over the same pairs."""
    parts = []
    for part in _parts(base, len(latents)):
        adapter = None if theta is None else theta[part]
        parts.append(portrait_loss(base, adapter, list(latents[part, None]), pairs))
        tell("loss", min(part.stop, len(latents)), len(latents))
    return torch.cat(parts)


def _parts(base: Base, people: int) -> Iterator[slice]:
    """Divide people into groups that go side by side."""
    size = 1 if base.plan.at_once else AT_ONCE
    return (slice(first, first + size) for first in range(0, people, size))


def refine_all(base: Base, theta: Theta, faces: Faces, tell: Tell) -> Theta:
    """Relax and refine P people as `hdb new` does, person p on face p, a few dozen at once."""
    config = personalise.settle(base, None, None, RefineConfig.seed, RefineConfig.optimizer)
    own = [Faces(*(rows[p : p + 1] for rows in faces)) for p in range(len(theta))]
    done = []
    for part in _parts(base, len(own)):
        start, latents = relax(theta[part], config.rank), [face.latents for face in own[part]]
        done.append(refine(base, start, latents, config, tell, own[part]).theta)
    return stack(done)


def _retrieval_of(base: Base, theta: Theta, gallery: Tensor, tell: Tell) -> Retrieval:
    """Draw one portrait of each person and look each up among the true photos."""
    seeds = list(range(len(theta.down)))
    drawn = generate(base, theta, PORTRAIT, seeds, base.spec.sampling, tell)
    return retrieval(embed([picture.image for picture in drawn]), gallery)
