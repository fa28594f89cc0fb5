"""Algebra of identities: sums are sums of dW, the lower rank is the closest, spectra are
dW's own."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hdbcli.method.algebra import compose, decompose, relax, shrink
from hdbcli.method.lidb import Theta
from registry.errors import HdbError

A, B, TARGETS = 12, 6, 3


def theta(rank: int, seed: int, batch: int = 2) -> Theta:
    generator = torch.Generator().manual_seed(seed)
    down = torch.randn(batch, TARGETS, rank, A, generator=generator)
    return Theta(down, torch.randn(batch, TARGETS, B, rank, generator=generator))


def core(x: Theta) -> Tensor:
    return x.up.double() @ x.down.double()


@pytest.mark.parametrize("rank", [1, 3, 8])
def test_the_spectrum_is_that_of_dw(rank: int) -> None:
    generator = torch.Generator().manual_seed(1)
    left = torch.linalg.qr(torch.randn(40, B, generator=generator)).Q.double()
    right = torch.linalg.qr(torch.randn(50, A, generator=generator)).Q.double()
    x = theta(rank, 0)
    u, s, v = decompose(x)
    whole = left @ core(x) @ right.T  # (B, L, 40, 50)
    expected = torch.linalg.svdvals(whole)[..., : s.shape[-1]]
    torch.testing.assert_close(s, expected)
    torch.testing.assert_close(u @ torch.diag_embed(s) @ v, core(x))
    skewed = (
        (left * torch.arange(1, B + 1)) @ core(x) @ right.T
    )  # the control: no orthonormal basis
    assert not torch.allclose(torch.linalg.svdvals(skewed)[..., : s.shape[-1]], s, rtol=0.1)


def test_shrinking_is_the_closest_and_tells_what_it_costs() -> None:
    x = theta(5, 2)
    for rank in (1, 2, 4):
        smaller, lost = shrink(x, rank)
        assert smaller.rank == rank
        off = (core(x) - core(smaller)).square().sum((1, 2, 3)) / core(x).square().sum((1, 2, 3))
        torch.testing.assert_close(off, lost, rtol=1e-4, atol=1e-9)
        cut = Theta(
            x.down[:, :, :rank], x.up[..., :rank]
        )  # the control: the first ranks as they are
        worse = (core(x) - core(cut)).square().sum((1, 2, 3)) / core(x).square().sum((1, 2, 3))
        assert (worse > 1.2 * lost).all()
    same, lost = shrink(x, 5)
    torch.testing.assert_close(core(same), core(x), rtol=1e-5, atol=1e-5)
    assert (lost < 1e-12).all()
    nothing, lost = shrink(Theta(x.down, x.up * 0), 1)
    assert (lost == 0).all() and (core(nothing) == 0).all()
    for rank, instead in ((0, "give 1 to 5"), (6, "hdb relax gives more ranks")):
        with pytest.raises(HdbError, match=f"from rank 5 to {rank}; {instead}"):
            shrink(x, rank)


def test_a_relaxed_identity_shrinks_back_for_free() -> None:
    x = theta(1, 3)
    back, lost = shrink(relax(x, 4), 1)
    torch.testing.assert_close(core(back), core(x), rtol=1e-5, atol=1e-6)
    assert (lost < 1e-12).all()


@pytest.mark.parametrize("ranks", [(1, 1), (2, 3), (4, 5)])
def test_a_composed_identity_is_the_sum(ranks: tuple[int, int]) -> None:
    x, y = theta(ranks[0], 4), theta(ranks[1], 5)
    both = compose([x, y], [0.6, -0.4])
    torch.testing.assert_close(core(both), 0.6 * core(x) - 0.4 * core(y), rtol=1e-5, atol=1e-5)
    assert both.rank == min(sum(ranks), B)  # beyond b a rank adds nothing
    assert not torch.allclose(core(both), 0.6 * core(x) + 0.4 * core(y), atol=1e-2)
    factors = Theta(0.6 * x.down[:, :, :1] - 0.4 * y.down[:, :, :1], x.up[..., :1])
    assert not torch.allclose(core(both), core(factors), atol=1e-2)  # adding factors is no sum


def test_alike_people_can_be_subtracted() -> None:
    x, noise = theta(2, 6), theta(2, 7)
    near = Theta(x.down + 0.01 * noise.down, x.up + 0.01 * noise.up)
    difference = compose([x, near], [1.0, -1.0])
    wanted = core(x) - core(near)
    coarse = Theta(difference.down.half(), difference.up.half())  # as a file keeps it
    assert (core(coarse) - wanted).norm() < 1e-3 * wanted.norm()
    side_by_side = Theta(torch.cat([x.down, near.down], 2), torch.cat([x.up, -near.up], 3))
    coarse = Theta(side_by_side.down.half(), side_by_side.up.half())
    assert (core(coarse) - wanted).norm() > 1e-2 * wanted.norm()  # the control


def test_a_rank_without_energy_can_still_learn() -> None:
    x = theta(1, 8)
    twice = compose([x, x], [0.5, 0.5])
    assert twice.rank == 2 and (twice.up[..., 1] == 0).all()
    torch.testing.assert_close(twice.down[:, :, 1].norm(dim=-1), torch.ones(2, TARGETS))
    nothing = compose([x, x], [1.0, -1.0])
    assert (nothing.up == 0).all() and (nothing.down.norm(dim=-1) > 0.99).all()


def test_composing_with_oneself_needs_no_second_rank() -> None:
    x = theta(2, 6)
    half = compose([x, x], [0.5, 0.5], rank=2)
    torch.testing.assert_close(core(half), core(x), rtol=1e-5, atol=1e-5)
    with pytest.raises(HdbError, match="2 identities and 1 weights"):
        compose([x, x], [1.0])
    with pytest.raises(HdbError, match="cannot be composed"):
        compose([x, Theta(x.down[..., :-1], x.up)], [1.0, 1.0])
