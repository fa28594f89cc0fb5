"""Choose the rank and number format of an identity so that its file keeps within its
base's budget."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hdbcli.config import RefineConfig
from registry.checkpoints.safetensors import DTYPE_BYTES
from registry.identity_facts import LAYOUTS

if TYPE_CHECKING:
    from hdbcli.identity.file import Identity

HEADER = 1500  # bytes; 1,304 with the longest name of a base
BY_DEFAULT = ("fp16", "int8")  # the finer first; fp32 is finer than training is


def file_bytes(targets: int, a: int, b: int, rank: int, dtype: str) -> int:
    """Return at most how many bytes an identity's file has."""
    layout = LAYOUTS[dtype]
    scales = sum(DTYPE_BYTES[kind] for name, kind in layout.items() if name.endswith("_scale"))
    number = DTYPE_BYTES[layout["down"]]
    return HEADER + targets * rank * (number * (a + b) + scales)


def dtype_within(budget: int, targets: int, a: int, b: int, rank: int) -> str:
    """Return fp16, or int8 where only that fits; a rank asked for that fits neither stays fp16."""
    fitting = (d for d in BY_DEFAULT if file_bytes(targets, a, b, rank, d) <= budget)
    return next(fitting, BY_DEFAULT[0])


def dtype_for(identity: Identity, budget: int) -> str:
    """Return the number format in which an identity is written unless another is asked for."""
    (targets, rank, a), b = identity.down.shape, identity.up.shape[1]
    return dtype_within(budget, targets, a, b, rank)


def rank_within(budget: int, targets: int, a: int, b: int) -> int:
    """Return the rank to refine at: the usual one, or the highest that fits in some format."""
    least = BY_DEFAULT[-1]
    ranks = range(RefineConfig.rank, 0, -1)
    return next((r for r in ranks if file_bytes(targets, a, b, r, least) <= budget), 1)
