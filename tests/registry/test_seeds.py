"""A seed counts as a whole, and small ones stay what they always were."""

from __future__ import annotations

import torch

from registry.seeds import generator_of


def drawn(seed: int) -> list[float]:
    return torch.randn(8, generator=generator_of(seed)).tolist()


def test_seeds_that_differ_by_two_to_the_32_draw_differently() -> None:
    plain = [torch.randn(8, generator=torch.Generator().manual_seed(s)).tolist() for s in (5, 7)]
    assert [drawn(5), drawn(7)] == plain  # pictures of before can be drawn again
    seeds = (5, 5 + 2**32, 5 + 2**33, 2**32, 2**63 - 1, 2**63 - 1 - 2**32)
    assert len({tuple(drawn(seed)) for seed in seeds}) == len(seeds)
    assert drawn(5 + 2**32) == drawn(5 + 2**32)
    torch_alone = (torch.Generator().manual_seed(s) for s in (5, 5 + 2**32))
    one, other = (torch.randn(8, generator=each).tolist() for each in torch_alone)
    assert one == other  # the control: why the seed is mixed
