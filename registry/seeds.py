"""Turn a seed of the user into a generator of torch's, and generators into noise."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

TORCH = 2**32  # seeds that torch's generator on the CPU tells apart


def generator_of(seed: int) -> torch.Generator:
    """Return a generator for a seed of 0 to 2**63 - 1, the same on every machine.

    Torch reads the lowest 32 bits alone. A seed that has more is mixed into 32 first, so that seeds
    2**32 apart draw different pictures; a smaller one is left as it is.
    """
    if seed >= TORCH:
        digest = hashlib.sha256(seed.to_bytes(8, "little")).digest()
        seed = int.from_bytes(digest[:4], "little")
    return torch.Generator().manual_seed(seed)


def noise_of(generators: Iterable[torch.Generator], shape: Sequence[int]) -> Tensor:
    """Draw noise of a shape from each of B generators: (B, *shape) float32, on the CPU."""
    return torch.stack([torch.randn(tuple(shape), generator=each) for each in generators])
