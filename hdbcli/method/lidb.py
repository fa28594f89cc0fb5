"""Lightweight DreamBooth (LiDB): a linear layer whose residual lives in a frozen basis, one
identity per sample.

HyperDreamBooth §3.2:  dW = up_basis @ up @ down @ down_basis.  Letters, here and in every file of
the maths: B samples, L targets, R rank, a and b the widths of the basis on the input (down) and
output (up) side, W is n x m. Only `down` (R, a) and `up` (b, R) are trained; all targets of an
identity share R, a and b, so that theta packs into one flat tensor.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Theta:
    """The trained numbers of B identities, all targets at once: `down` (B, L, R, a), `up` (B, L,
    b, R)."""

    down: Tensor
    up: Tensor

    @property
    def rank(self) -> int:
        return self.down.shape[-2]

    def __len__(self) -> int:
        return len(self.down)

    def __getitem__(self, samples: slice | list[int] | Tensor) -> Theta:
        return Theta(self.down[samples], self.up[samples])

    def to(self, device: str | torch.device) -> Theta:
        return Theta(self.down.to(device), self.up.to(device))

    def scaled(self, strength: float) -> Theta:
        """Scale dW by `strength`, exactly: dW is linear in `up`."""
        return Theta(self.down, self.up * strength)


@dataclass(frozen=True)
class Factors:
    """Residuals of B samples without a basis, a pair for each target: D (B, R, m), U (B, n, R).

    What theta becomes when it is worn, and what LoRA trains.
    """

    down: tuple[Tensor, ...]
    up: tuple[Tensor, ...]

    def __len__(self) -> int:
        return len(self.down[0])

    def __getitem__(self, samples: slice | list[int] | Tensor) -> Factors:
        return Factors(tuple(d[samples] for d in self.down), tuple(u[samples] for u in self.up))

    def plus(self, other: Factors) -> Factors:
        """Add the residuals of another, rank beside rank."""
        down = (torch.cat(pair, dim=1) for pair in zip(self.down, other.down, strict=True))
        up = (torch.cat(pair, dim=2) for pair in zip(self.up, other.up, strict=True))
        return Factors(tuple(down), tuple(up))


class LiDBLinear(nn.Module):
    """A frozen linear layer plus, while one is worn, the residual (D, U) of each sample's
    identity."""

    down_basis: Tensor
    up_basis: Tensor

    def __init__(self, base: nn.Linear, down_basis: Tensor, up_basis: Tensor) -> None:
        super().__init__()
        self.base = base
        self.register_buffer("down_basis", down_basis, persistent=False)  # (a, m)
        self.register_buffer("up_basis", up_basis, persistent=False)  # (n, b)
        self.residual: tuple[Tensor, Tensor] | None = None

    def factors(self, down: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
        """Multiply cores `down` (B, R, a) and `up` (B, b, R) by the basis, once and not per token:
        D (B, R, m), U (B, n, R)."""
        return down @ self.down_basis, self.up_basis @ up

    def forward(self, x: Tensor) -> Tensor:
        """Return base(x) + x D^T U^T for x (k B, ..., m).

        With B = 1 everyone wears the same. k is 2 under classifier-free guidance, which stacks the
        batch. Without gradients the residual is added in place: a sum of wide tensors costs more
        than all of the rest.
        """
        y = self.base(x)
        if self.residual is None:
            return y
        down, up = (core.to(y.dtype) for core in self.residual)
        if len(down) == 1:
            rows, narrow = y.flatten(0, -2), F.linear(x, down[0].to(x.dtype)).to(y.dtype)
            out = None if torch.is_grad_enabled() else rows
            return torch.addmm(rows, narrow.flatten(0, -2), up[0].mT, out=out).view(y.shape)
        tokens = x.unflatten(0, (-1, len(down))).flatten(2, -2)  # (k, B, T, m)
        narrow = (tokens @ down.mT.to(x.dtype)).to(y.dtype).flatten(0, 1)
        rows = y.view(*narrow.shape[:2], -1)
        out = None if torch.is_grad_enabled() else rows
        return torch.baddbmm(rows, narrow, up.mT.repeat(len(tokens), 1, 1), out=out).view(y.shape)

    def delta(self) -> Tensor:
        """Return dW (n, m) in float32 of the one identity worn: U @ D."""
        assert self.residual is not None and len(self.residual[0]) == 1, "wear one identity first"
        down, up = self.residual
        return up[0].float() @ down[0].float()

    @torch.no_grad()
    def fused(self) -> nn.Linear:
        """Return a plain linear layer with W + dW, cast once to the base's dtype. One-way: for
        merging."""
        base = self.base
        fused = nn.Linear(base.in_features, base.out_features, base.bias is not None)
        fused = fused.to(base.weight)
        fused.weight.copy_(base.weight.float() + self.delta())
        if base.bias is not None:
            fused.bias.copy_(base.bias)
        return fused


def first_theta(count: int, a: int, b: int, rank: int = 1) -> Theta:
    """Return theta_0 of one identity on `count` targets, shared by all people of a base.

    `up` is 0, so the model equals its base; `down` is not, so gradients flow from the first step:
    with both zero none ever would. `down` is a fixed pattern of cosines (rows of a DCT),
    orthonormal for R <= a.
    """
    position = (torch.arange(a, dtype=torch.float64) + 0.5) * torch.pi / a
    rows = torch.cos(position * torch.arange(1, rank + 1, dtype=torch.float64)[:, None])
    down = (rows * (2 / a) ** 0.5).float()  # (R, a)
    return Theta(down.expand(1, count, rank, a).clone(), torch.zeros(1, count, b, rank))


def inner(x: Theta, y: Theta) -> Tensor:
    """Return <dW, dW'> of each target (B, L): the basis is orthonormal, so the cores suffice.

    Unlike the factors it does not change under (c up, down / c), which leaves dW the same.
    """
    return ((x.up.mT @ y.up) * (x.down @ y.down.mT)).sum((-2, -1))


def pack(theta: Theta) -> Tensor:
    """Flatten theta into one tensor (B, L x R x (a+b)): one parameter for the optimizer.

    8-bit optimizers keep tensors under 4,096 numbers in 32 bits, so separate cores would gain
    nothing.
    """
    return torch.cat([theta.down.flatten(1), theta.up.flatten(1)], dim=1)


def unpack(flat: Tensor, count: int, a: int, b: int) -> Theta:
    """Undo `pack`, as views of `flat` (B, ...): theta of B identities on `count` targets."""
    batch, numbers = flat.shape
    rank = numbers // (count * (a + b))
    down, up = flat.split([count * rank * a, count * rank * b], dim=1)
    return Theta(down.view(batch, count, rank, a), up.view(batch, count, b, rank))
