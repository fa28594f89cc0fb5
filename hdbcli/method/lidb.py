"""Lightweight DreamBooth (LiDB): a layer whose residual lives in a frozen basis, one identity
per sample.

HyperDreamBooth §3.2:  dW = up_basis @ up @ down @ down_basis.  Letters, here and in every file of
the maths: B samples, L targets, R rank, a and b the widths of the basis on the input (down) and
output (up) side, W is n x m. Only `down` (R, a) and `up` (b, R) are trained; all targets of an
identity share R, a and b, so that theta packs into one flat tensor.

A convolution (n, c, h, w) is a target like a linear layer: its W is n x m with m = c h w. Only the
product of W and an input differs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeAlias

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

    def as_leaves(self) -> Theta:
        """Return the same numbers cut off from what made them, for gradients to gather at."""
        return Theta(*(core.detach().requires_grad_() for core in (self.down, self.up)))

    def backward(self, leaves: Theta) -> None:
        """Send the gradients that gathered at the leaves through what made this theta, all at
        once."""
        gathered = leaves.down.grad, leaves.up.grad
        torch.autograd.backward((self.down, self.up), gathered)


@dataclass(frozen=True)
class Factors:
    """Residuals of B samples without a basis, a pair for each target: D (B, R, m), U (B, n, R).

    What theta is multiplied out to before use, and what LoRA trains.
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


class LiDBLayer(nn.Module):
    """A frozen layer with weight W (n, m) and, while it is adapted, the residual dW = U D of
    each sample's own.

    A kind of layer only says what `plus_residual` is; the rest is the same for all.
    """

    base: Any
    down_basis: Tensor
    up_basis: Tensor

    def __init__(self, base: nn.Module, down_basis: Tensor, up_basis: Tensor) -> None:
        super().__init__()
        self.base = base
        self.register_buffer("down_basis", down_basis, persistent=False)  # (a, m)
        self.register_buffer("up_basis", up_basis, persistent=False)  # (n, b)
        self.residual: tuple[Tensor, Tensor] | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """Return (n, m), the shape of W as a matrix."""
        return len(self.up_basis), self.down_basis.shape[1]

    def factors(self, down: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
        """Multiply cores `down` (B, R, a) and `up` (B, b, R) by the basis, once and not per token:
        D (B, R, m), U (B, n, R)."""
        return down @ self.down_basis, self.up_basis @ up

    def forward(self, x: Tensor) -> Tensor:
        """Return W x + U (D x).

        x holds k B samples, and sample i has the residual of identity i mod B: with B = 1 all have
        the same, and k is 2 under classifier-free guidance, which stacks the batch.
        """
        y: Tensor = self.base(x)
        if self.residual is None:
            return y
        down, up = self.residual
        return self.plus_residual(y, x, down.to(x.dtype), up.to(y.dtype))

    def plus_residual(self, y: Tensor, x: Tensor, down: Tensor, up: Tensor) -> Tensor:
        """Return y + U (D x) of each sample for D (B, R, m) and U (B, n, R)."""
        raise NotImplementedError

    def as_weights(self, down: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
        """Shape one identity's D (R, m) and U (n, R) as the weights of two layers like this one,
        which give U (D x) when run after each other."""
        return down, up

    def delta(self) -> Tensor:
        """Return dW (n, m) in float32 of the layer's one identity: U @ D."""
        assert self.residual is not None and len(self.residual[0]) == 1, "set one identity first"
        down, up = self.residual
        return up[0].float() @ down[0].float()


class LiDBLinear(LiDBLayer):
    """A linear layer: y + (x D^T) U^T for x (k B, ..., m) and y (k B, ..., n)."""

    def plus_residual(self, y: Tensor, x: Tensor, down: Tensor, up: Tensor) -> Tensor:
        tokens = _tokens(x, len(down))  # (k B, T, m)
        z = tokens @ _dealt(down, len(tokens)).mT  # (k B, T, R)
        added = _plus_product(_tokens(y, len(up)), z.to(y.dtype), _dealt(up, len(z)).mT)
        return added.view(y.shape)


class LiDBConv2d(LiDBLayer):
    """A convolution: y + U * (D * x) for x (k B, c, H, W) and y (k B, n, H', W'), where D is a
    convolution to R channels with the layer's kernel, stride and padding, and U one of 1 x 1."""

    def plus_residual(self, y: Tensor, x: Tensor, down: Tensor, up: Tensor) -> Tensor:
        kernels = down.unflatten(2, (-1, *self.base.kernel_size))  # (B, R, c, h, w)
        z = _convolved(x, kernels, self.base).flatten(2)  # (k B, R, H' W')
        added = _plus_product(y.flatten(2), _dealt(up, len(z)), z.to(y.dtype))
        return added.view(y.shape)

    def as_weights(self, down: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
        return down.unflatten(1, (-1, *self.base.kernel_size)), up[:, :, None, None]


TargetLayer: TypeAlias = nn.Linear | nn.Conv2d
LAYERS: dict[type[nn.Module], type[LiDBLayer]] = {nn.Linear: LiDBLinear, nn.Conv2d: LiDBConv2d}


def shape_of(layer: TargetLayer) -> tuple[int, int]:
    """Return the (n, m) of a layer's weight as a matrix; quantised weights are not stored so."""
    if isinstance(layer, nn.Linear):
        return layer.out_features, layer.in_features
    height, width = layer.kernel_size
    return layer.out_channels, layer.in_channels * height * width


def reach(conv: nn.Conv2d) -> tuple[int, ...]:
    """Return how many pixels lie between the first and the last tap of a kernel, down and right."""
    return tuple(
        (side - 1) * step for side, step in zip(conv.kernel_size, conv.dilation, strict=True)
    )


def lidb_layer(base: TargetLayer, down_basis: Tensor, up_basis: Tensor) -> LiDBLayer:
    """Wrap a layer of either kind."""
    kind = next(kind for layer, kind in LAYERS.items() if isinstance(base, layer))
    return kind(base, down_basis, up_basis).train(base.training)


def _tokens(x: Tensor, identities: int) -> Tensor:
    """Lay x (k B, ..., m) out as (k B, T, m), or as one long sample where one identity serves all:
    a single large product is faster than many small ones."""
    return x.reshape(1 if identities == 1 else len(x), -1, x.shape[-1])


def _dealt(factors: Tensor, samples: int) -> Tensor:
    """Deal B identities' factors (B, ., .) out to `samples` = k B samples in turn."""
    return factors.expand(samples // len(factors), *factors.shape).flatten(0, 1)


def _plus_product(y: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """Return y + left @ right of each sample, in one step: the sum of two wide tensors would cost
    more than all the rest. Without gradients y is overwritten."""
    return torch.baddbmm(y, left, right, out=None if torch.is_grad_enabled() else y)


def _convolved(x: Tensor, kernels: Tensor, like: nn.Conv2d) -> Tensor:
    """Convolve x (k B, c, H, W) with each sample's own kernels (B, R, c, h, w), as `like` does.

    For more than one identity every tap of a kernel is multiplied with every pixel, which makes h w
    numbers for each of the R channels, and `fold` adds up what falls on the same output pixel. That
    is faster than one convolution of B groups with so few channels each: 50 ms forward and backward
    against 73, of which the layer alone takes 36 (16 identities of rank 1 on 16 x 16 x 128, one
    thread).
    """
    if len(kernels) == 1:
        return F.conv2d(x, kernels[0], None, like.stride, like.padding, like.dilation)
    far, pads = reach(like), tuple(map(int, like.padding))
    padding = tuple(r - pad for r, pad in zip(far, pads, strict=True))
    size = tuple(x.shape[2 + i] + 2 * pads[i] - far[i] for i in range(2))  # at a stride of 1
    taps = kernels.flip(3, 4).permute(0, 1, 3, 4, 2).flatten(1, 3)  # (B, R h w, c)
    columns = _dealt(taps, len(x)) @ x.flatten(2)  # (k B, R h w, H W)
    whole = F.fold(columns, size, like.kernel_size, like.dilation, padding)
    return whole[:, :, :: like.stride[0], :: like.stride[1]]


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

    8-bit optimizers keep tensors under 4,096 numbers in 32 bits, so separate cores would
    gain nothing.
    """
    return torch.cat([theta.down.flatten(1), theta.up.flatten(1)], dim=1)


def unpack(flat: Tensor, count: int, a: int, b: int) -> Theta:
    """Undo `pack`, as views of `flat` (B, ...): theta of B identities on `count` targets."""
    batch, numbers = flat.shape
    rank = numbers // (count * (a + b))
    down, up = flat.split([count * rank * a, count * rank * b], dim=1)
    return Theta(down.view(batch, count, rank, a), up.view(batch, count, b, rank))
