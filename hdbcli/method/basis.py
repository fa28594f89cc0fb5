"""The frozen random orthogonal basis of a target: a pure function of its name, never stored with
an identity.

HyperDreamBooth §3.2 splits a rank-1 residual again by two frozen matrices ("Aux"): `down_basis` (a,
m) with orthonormal rows and `up_basis` (n, b) with orthonormal columns, for a weight W (n, m). An
identity is only valid with the basis it was trained in, so the basis must come out the same on
every machine and device, in every library version. No random library promises that; a hash does:
SHAKE-256 of the target's name gives bits, bits become signs +1/-1, and a Cholesky factor of their
exact integer Gram matrix makes them orthonormal.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from registry.errors import HdbError

SCHEME = "shake256-cholesky-1"
PROBE_TOLERANCE = 1e-5


@dataclass(frozen=True)
class Fingerprint:
    """What an identity file remembers of its basis: exact sign bits by digest, a few values
    by probe."""

    scheme: str
    seed: int
    digest: str
    probes: tuple[float, ...]


def sign_bits(seed: int, target: str, side: str, rows: int, columns: int) -> bytes:
    """Return rows x columns bits, packed eight to a byte: the hash of the matrix's
    own description."""
    text = f"{SCHEME}|{seed}|{target}|{side}|{rows}x{columns}".encode()
    return hashlib.shake_256(text).digest((rows * columns + 7) // 8)


def signs(seed: int, target: str, side: str, rows: int, columns: int) -> Tensor:
    """Return the (rows, columns) matrix of +1/-1, float64, whose bits `sign_bits` gives."""
    count = rows * columns
    data = bytearray(sign_bits(seed, target, side, rows, columns))
    packed = torch.frombuffer(data, dtype=torch.uint8)
    bits = packed[:, None] >> torch.arange(8, dtype=torch.uint8) & 1  # lowest bit first
    return bits.flatten()[:count].view(rows, columns).double() * 2 - 1


def orthonormal(matrix: Tensor) -> Tensor:
    """Make the rows of `matrix` (k, w), k <= w, orthonormal: Q = L^-1 M with L L^T = M M^T,
    diag(L) > 0."""
    factor = torch.linalg.cholesky(matrix @ matrix.T)
    if factor.diagonal().min() < 1e-6:  # rounding hides dependent rows from the factorisation
        raise torch.linalg.LinAlgError("the rows are linearly dependent")
    return torch.linalg.solve_triangular(factor, matrix, upper=False)


def down_basis(seed: int, target: str, a: int, m: int) -> Tensor:
    """Return the input side's basis, (a, m) float32 with orthonormal rows."""
    return _side(seed, target, "down", a, m)


def up_basis(seed: int, target: str, b: int, n: int) -> Tensor:
    """Return the output side's basis, (n, b) float32 with orthonormal columns."""
    return _side(seed, target, "up", b, n).T.contiguous()


def _side(seed: int, target: str, side: str, k: int, width: int) -> Tensor:
    if k > width:
        raise HdbError(
            f"target {target} is {width} wide on its {side} side, too narrow for a basis of {k}; "
            "the base model's spec must give a smaller a or b"
        )
    try:
        return orthonormal(signs(seed, target, side, k, width)).float()
    except torch.linalg.LinAlgError:  # dependent rows: only where k is close to a small width
        raise HdbError(
            f"the basis of {target} ({k} of {width}) is degenerate; give the base model's spec "
            "another basis_seed or a smaller a or b"
        ) from None


def fingerprint(seed: int, targets: Mapping[str, tuple[int, int]], a: int, b: int) -> Fingerprint:
    """Describe the basis of `targets` (name -> (n, m)) so that a file can tell whether it still
    has it.

    The digest covers every sign bit and is exact everywhere; the probes are corners of the first
    and last target's matrices and catch a linear-algebra library that orthonormalises differently.
    """
    digest = hashlib.sha256()
    for name, (n, m) in targets.items():
        for side, k, width in (("down", a, m), ("up", b, n)):
            digest.update(sign_bits(seed, name, side, k, width))
    probes = []
    for name in (next(iter(targets)), list(targets)[-1]):
        n, m = targets[name]
        probes += [down_basis(seed, name, a, m)[-1, -1], up_basis(seed, name, b, n)[-1, -1]]
    return Fingerprint(SCHEME, seed, digest.hexdigest(), tuple(float(p) for p in probes))
