"""What can be done with identities as matrices: more ranks, fewer, their spectrum, weighted sums.

The basis is orthonormal, so the singular values of dW = up_basis @ up @ down @ down_basis are those
of its core up @ down (b x a), and everything here happens in the cores, never on n x m matrices.
Identities of one base share their basis: sums of cores are sums of dW, exactly.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hdbcli.method.lidb import Theta, first_theta
from registry.errors import HdbError


def relax(theta: Theta, rank: int) -> Theta:
    """Return `theta` (B, L, R, ...) with `rank` >= R; more than b ranks could add nothing.

    HyperDreamBooth §3.4. The added ranks start with `up` = 0, so dW is the same to the last bit,
    and with `down` not 0, so that the first step of refinement already trains them.
    """
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


def decompose(theta: Theta) -> tuple[Tensor, Tensor, Tensor]:
    """Return U (B, L, b, K), S (B, L, K) falling, V (B, L, K, a) of every core, K = min(R, a, b).

    Through two QR decompositions, so that the SVD itself is of K x K matrices; in float64.
    """
    left, up = torch.linalg.qr(theta.up.double())
    right, down = torch.linalg.qr(theta.down.double().mT)
    u, s, v = torch.linalg.svd(up @ down.mT, full_matrices=False)
    return left @ u, s, v @ right.mT


def shrink(theta: Theta, rank: int) -> tuple[Theta, Tensor]:
    """Return the closest theta of `rank`, and the energy lost, as a share of each identity's (B,).

    The truncated SVD is the closest there is (Eckart and Young 1936). Each factor takes the root of
    the singular values, so that neither grows small where floats are coarse. A rank without energy
    gets `up` = 0 and a `down` of length 1: refinement can still train it.
    """
    u, s, v = decompose(theta)
    if not 1 <= rank <= theta.rank:
        instead = "hdb relax gives more ranks" if rank > theta.rank else f"give 1 to {theta.rank}"
        raise HdbError(f"cannot shrink from rank {theta.rank} to {rank}; {instead}")
    energy = s.square().sum((1, 2))
    kept = s[..., :rank].square().sum((1, 2))
    lost = (1 - kept / energy.clamp(min=1e-30)).clamp(min=0) * (energy > 0)
    size = theta.up.double().norm(dim=(2, 3)) * theta.down.double().norm(dim=(2, 3))  # (B, L)
    alive = s[..., :rank] > 1e-8 * size[..., None]  # below is the rounding of float32
    root = s[..., :rank].sqrt()
    down = torch.where(alive, root, 1.0)[..., :, None] * v[..., :rank, :]
    up = u[..., :, :rank] * torch.where(alive, root, 0.0)[..., None, :]
    missing = rank - root.shape[-1]  # the rank asked for may be above that of any core
    if missing > 0:
        down = torch.nn.functional.pad(down, (0, 0, 0, missing))
        up = torch.nn.functional.pad(up, (0, missing))
    return Theta(down.to(theta.down.dtype), up.to(theta.up.dtype)), lost


def compose(thetas: Sequence[Theta], weights: Sequence[float], rank: int | None = None) -> Theta:
    """Return the weighted sum of identities, exact up to a rank of b, or the closest of `rank`.

    Weights may be negative. Ranks are put side by side; beyond min(a, b) they could add nothing.
    Then they are made orthogonal: where identities nearly cancel, as alike people do, small
    differences of large factors would be lost in the rounding of a file.
    """
    if len(thetas) != len(weights) or not thetas:
        raise HdbError(f"{len(thetas)} identities and {len(weights)} weights")
    shapes = {(t.down.shape[1], t.down.shape[3], t.up.shape[2]) for t in thetas}
    if len(shapes) > 1:
        raise HdbError(f"identities of different targets, a, b cannot be composed: {shapes}")
    down = torch.cat([t.down for t in thetas], dim=2)
    up = torch.cat([t.up * weight for t, weight in zip(thetas, weights, strict=True)], dim=3)
    if not up.isfinite().all():
        raise HdbError(
            f"weights up to {max(map(abs, weights)):g} make numbers too large to hold; give "
            "smaller ones"
        )
    whole = Theta(down, up)
    ((_, a, b),) = shapes
    return shrink(whole, min(whole.rank, a, b) if rank is None else rank)[0]
