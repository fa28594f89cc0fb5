"""The LiDB layer against plain matrix algebra, each claim with a control that fails."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from hdbcli.method.algebra import relax
from hdbcli.method.basis import down_basis, up_basis
from hdbcli.method.lidb import LiDBLinear, Theta, first_theta, pack, unpack

A, B, N, M = 12, 6, 20, 16


def layer(bias: bool = True) -> LiDBLinear:
    torch.manual_seed(0)
    linear = nn.Linear(M, N, bias)
    return LiDBLinear(linear, down_basis(1, "x", A, M), up_basis(1, "x", B, N))


def cores(batch: int, rank: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(batch * 10 + rank)
    down = torch.randn(batch, rank, A, generator=generator)
    return down, torch.randn(batch, B, rank, generator=generator)


def test_residual_is_the_papers_formula() -> None:
    lidb, (down, up) = layer(), cores(1, 3)
    delta = lidb.up_basis @ up[0] @ down[0] @ lidb.down_basis
    x = torch.randn(5, 7, M)
    lidb.residual = lidb.factors(down, up)
    torch.testing.assert_close(lidb(x), lidb.base(x) + x @ delta.T, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(lidb.delta(), delta, atol=1e-6, rtol=1e-5)
    assert (lidb(x) - lidb.base(x)).abs().max() > 0.1


def test_each_sample_has_its_own_adapter() -> None:
    lidb, (down, up) = layer(), cores(4, 2)
    x = torch.randn(4, 7, M)
    lidb.residual = lidb.factors(down, up)
    together = lidb(x)
    for i in range(4):
        lidb.residual = lidb.factors(down[i : i + 1], up[i : i + 1])
        torch.testing.assert_close(together[i : i + 1], lidb(x[i : i + 1]), atol=1e-5, rtol=1e-5)
    lidb.residual = lidb.factors(down.roll(1, 0), up.roll(1, 0))
    assert (together - lidb(x)).abs().max() > 0.1


def test_guidance_stacks_the_batch() -> None:
    lidb, (down, up) = layer(), cores(3, 2)
    x = torch.randn(3, 7, M)
    lidb.residual = lidb.factors(down, up)
    torch.testing.assert_close(lidb(torch.cat([x, x])), torch.cat([lidb(x)] * 2))


def test_theta_0_is_the_base_but_not_dead() -> None:
    lidb, x = layer(), torch.randn(2, 7, M)
    theta = first_theta(1, A, B)
    up = theta.up[:, 0].clone().requires_grad_(True)
    down = theta.down[:, 0].clone().requires_grad_(True)
    lidb.residual = lidb.factors(down, up)
    assert torch.equal(lidb(x), lidb.base(x))
    lidb(x).pow(2).sum().backward()
    assert up.grad is not None and up.grad.abs().max() > 1e-3
    dead = torch.zeros_like(up).requires_grad_(True)
    lidb.residual = lidb.factors(torch.zeros_like(down), dead)
    lidb(x).pow(2).sum().backward()
    assert dead.grad is not None and dead.grad.abs().max() == 0  # the control: both zero is dead


def test_gradients_reach_the_cores_only() -> None:
    lidb, (down, up) = layer(), cores(2, 1)
    lidb.requires_grad_(False)
    down.requires_grad_(True), up.requires_grad_(True)
    lidb.residual = lidb.factors(down, up)
    lidb(torch.randn(2, 3, M)).sum().backward()
    assert down.grad is not None and up.grad is not None
    assert all(p.grad is None for p in lidb.parameters())


def test_pack_is_exact_and_flat() -> None:
    down, up = torch.randn(3, 5, 2, A), torch.randn(3, 5, B, 2)
    flat = pack(Theta(down, up))
    assert flat.shape == (3, 5 * 2 * (A + B))
    again = unpack(flat, 5, A, B)
    assert torch.equal(again.down, down) and torch.equal(again.up, up) and again.rank == 2
    flat[1, 0] += 1
    assert again.down[1, 0, 0, 0] == down[1, 0, 0, 0] + 1  # views: the optimizer moves theta


def test_strength_scales_the_residual() -> None:
    lidb, (down, up) = layer(), cores(1, 2)
    theta = Theta(down[:, None], up[:, None])
    lidb.residual = lidb.factors(down, up)
    full = lidb.delta()
    half = theta.scaled(0.5)
    lidb.residual = lidb.factors(half.down[:, 0], half.up[:, 0])
    torch.testing.assert_close(lidb.delta(), full / 2)


def test_relaxed_equals_its_source_and_can_learn() -> None:
    down, up = cores(1, 1)
    theta = Theta(down[:, None], up[:, None])
    relaxed = relax(theta, 4)
    assert relaxed.rank == 4
    lidb = layer()
    lidb.residual = lidb.factors(down, up)
    before = lidb.delta()
    free = relaxed.up[:, 0].clone().requires_grad_(True)
    lidb.residual = lidb.factors(relaxed.down[:, 0], free)
    assert (lidb.delta() - before).abs().max() < 1e-6
    lidb(torch.randn(1, 3, M)).pow(2).sum().backward()
    assert free.grad is not None and (free.grad.abs().amax((0, 1)) > 1e-4).all()


def test_every_rank_starts_in_a_direction_of_its_own() -> None:
    """And theta_0 stays what it is: hypernetworks add to it, and no file holds it."""
    down = first_theta(2, A, B, 4).down
    torch.testing.assert_close(down @ down.mT, torch.eye(4).expand(1, 2, 4, 4), atol=1e-6, rtol=0)
    assert torch.equal(relax(first_theta(2, A, B), 4).down, down)
    first = torch.tensor([math.cos((k + 0.5) * math.pi / A) for k in range(A)]) / math.sqrt(A / 2)
    torch.testing.assert_close(down[0, 0, 0], first)
