"""An identity and its facts, as tests make them."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from registry.identity_facts import Facts

if TYPE_CHECKING:
    from hdbcli.identity.file import Identity
    from hdbcli.method.lidb import Theta
    from hdbcli.model.base import Base

TINY = 90, 96, 48  # targets of tiny, a and b
LATENT = 32, 16, 16  # of its pictures: channels, height, width

FACTS = Facts(
    base="tiny",
    family="sd1",
    base_digest="b" * 64,
    targets_digest="c" * 64,
    scheme="shake256-test",
    seed=7,
    basis_digest="d" * 64,
    probes=(0.0123456789, -0.25),
    identifier="sks",
    created="2026-11-22T12:00:00+00:00",
    steps=40,
    optimizer="AdamW8bit",
    hypernetwork="e" * 64,
    lineage=("relaxed from rank 1",),
    likeness=0.7312,
)


def facts(**changes: Any) -> Facts:
    """Return facts that differ from these."""
    return replace(FACTS, **changes)


def describe(base: Base, theta: Theta, hypernetwork: str = "") -> Identity:
    """Wrap a theta of one person as an identity of this base."""
    from hdbcli.identity.file import Identity, facts_of

    known = facts_of(base.spec, base.injected, hypernetwork)
    return Identity(known, theta.down[0].cpu(), theta.up[0].cpu())
