"""Make identities from identities: more ranks, fewer ranks, weighted sums of several.

What comes out says in its lineage what it was made from.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from hdbcli.identity.file import Identity, now
from hdbcli.method.algebra import compose, relax, shrink
from hdbcli.method.lidb import Theta
from registry.errors import HdbError, UsageError
from registry.identity_facts import WORD
from registry.store import shown

SAME = ("family", "base_digest", "targets_digest", "basis_digest", "identifier")  # to be added up


def relaxed(identity: Identity, rank: int) -> Identity:
    """Give an identity more ranks; it generates what it did. HdbError for the rank that it has."""
    if rank == identity.rank:
        raise HdbError(f"the identity has rank {rank} already, so nothing was written")
    theta = relax(identity.theta, rank)
    return _made(identity, theta, f"relaxed from rank {identity.rank} to {rank}")


def shrunk(identity: Identity, rank: int) -> tuple[Identity, float]:
    """Give an identity fewer ranks, the closest there are; and the share of its energy lost."""
    theta, lost = shrink(identity.theta, rank)
    made = _made(identity, theta, f"shrunk from rank {identity.rank} to {rank}")
    return made, float(lost[0])


def composed(parts: Mapping[str, tuple[Identity, float]], rank: int | None) -> Identity:
    """Add identities up, each name's with its weight; HdbError names what keeps two apart."""
    identities = [identity for identity, _ in parts.values()]
    names = list(parts)
    first = identities[0]
    for name, other in zip(names[1:], identities[1:], strict=True):
        for field in SAME:
            mine, theirs = getattr(first.facts, field), getattr(other.facts, field)
            if mine != theirs:
                raise HdbError(
                    f"{names[0]} and {name} cannot be added up: {field} is {mine[:12]} and "
                    f"{theirs[:12]}; only identities of one base share a basis"
                )
    thetas = [identity.theta for identity in identities]
    theta = compose(thetas, [weight for _, weight in parts.values()], rank)
    shares = [f"{weight:g} {shown(Path(name))}" for name, (_, weight) in parts.items()]
    how = [f"composed of {' + '.join(shares)}"]
    if len(how[0]) > WORD:
        how = [f"composed of {share}" for share in shares]
    before = (
        line for identity in identities for line in identity.facts.lineage
    )  # who is in the parts
    how += dict.fromkeys(line for line in before if line.startswith("composed of "))
    made = _made(first.saying(lineage=()), theta, *how)
    return made.saying(steps=0, optimizer="", hypernetwork="")


def read_weights(parts: Sequence[str]) -> dict[str, float]:
    """Read NAME=WEIGHT, a bare NAME being 1; HdbError for what is not a number or comes twice."""
    weights: dict[str, float] = {}
    for part in parts:
        name, _, text = part.partition("=")
        try:
            weight = float(text or 1)
        except ValueError:
            weight = math.nan
        if not math.isfinite(weight):
            raise UsageError(f"{part!r} has no weight; write {name or 'alice'}=0.6")
        if name in weights:
            raise UsageError(f"{name} comes twice; give its weights as one")
        weights[name] = weight
    return weights


def _made(identity: Identity, theta: Theta, *how: str) -> Identity:
    facts = replace(
        identity.facts, lineage=(*identity.facts.lineage, *how), likeness=None, created=now()
    )
    return Identity(facts, theta.down[0].contiguous(), theta.up[0].contiguous())
