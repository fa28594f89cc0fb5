"""Rank relaxation: give an identity more ranks inside its basis without changing what it generates.

HyperDreamBooth §3.4. The added ranks start with `up` = 0, so dW is the same to the last bit, and
with `down` not 0, so that the first step of refinement already trains them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from hdbcli.method.lidb import Theta, first_theta
from registry.errors import HdbError


def relax(theta: Theta, rank: int) -> Theta:
    """Return `theta` (B, L, R, ...) with `rank` >= R; more than b ranks could add nothing."""
    batch, targets, old, a = theta.down.shape
    b = theta.up.shape[2]
    if not old <= rank <= min(a, b):
        raise HdbError(
            f"cannot relax from rank {old} to {rank}; give a rank from {old} to {min(a, b)}"
        )
    added = first_theta(targets, a, b, rank)
    down = added.down[:, :, old:].to(theta.down).expand(batch, -1, -1, -1)
    up = added.up[:, :, :, old:].to(theta.up).expand(batch, -1, -1, -1)
    return Theta(torch.cat([theta.down, down], 2), torch.cat([theta.up, up], 3))


def stack(thetas: Sequence[Theta]) -> Theta:
    """Put identities of any ranks into one batch, relaxed to the highest of them."""
    rank = max(theta.rank for theta in thetas)
    relaxed = [relax(theta, rank) for theta in thetas]
    return Theta(torch.cat([t.down for t in relaxed]), torch.cat([t.up for t in relaxed]))
