"""Hold frozen linear layers in 8 or 4 bits; where 4 do not work, leave them as they are and say so.

8 bits are plain torch; 4 bits are bitsandbytes' nf4 (Dettmers et al. 2023, QLoRA). Gradients flow
through the layers to what lies before them, not into them.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hdbcli.model.device import give_back_memory


def quantise(modules: Iterable[nn.Module], kind: str) -> str | None:
    """Replace every plain linear layer inside the modules, in place, one after the other: `kind` is
    int8 or nf4.

    Return None, or a note if bitsandbytes is missing or broken; then nothing was changed.
    """
    modules = list(modules)
    device = next(parameter.device for module in modules for parameter in module.parameters())
    try:
        _probe(kind, device)
    except Exception as error:  # a broken native library raises anything
        reason = (str(error) or type(error).__name__).splitlines()[0]
        return f"bitsandbytes does not work here ({reason}); weights are not quantised"
    for module in modules:
        found = [path for path, part in module.named_modules() if type(part) is nn.Linear]
        for path in found:
            parent, _, name = path.rpartition(".")
            whole = module.get_submodule(parent)
            setattr(whole, name, quantised(getattr(whole, name), kind))
            give_back_memory()
    return None


class Int8Linear(nn.Linear):
    """A frozen linear layer whose weight (n, m) is int8 times a float32 step for each row.

    Inputs are not rounded, on any device. Not bitsandbytes' layer: on a GPU that rounds them too,
    reads rows of a transposed input as if they lay one after the other, and keeps what gradient
    checkpointing wants let go.
    """

    step: Tensor

    def __init__(self, linear: nn.Linear) -> None:
        weight = linear.weight.detach()
        with torch.device("meta"):
            super().__init__(linear.in_features, linear.out_features, bias=False)
        step = weight.abs().amax(1, keepdim=True).float().clamp(min=1e-30) / 127
        self.weight = nn.Parameter((weight / step).round().to(torch.int8), requires_grad=False)
        self.bias = linear.bias
        self.register_buffer("step", step.T.contiguous(), persistent=False)  # (1, n)

    def forward(self, x: Tensor) -> Tensor:
        y = _Int8Product.apply(x, self.weight, self.step)
        return y if self.bias is None else y + self.bias.to(y.dtype)


class _Int8Product(torch.autograd.Function):
    """x W^T, which keeps W for the backward pass as it is, in 8 bits."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, step: Tensor) -> Tensor:
        ctx.save_for_backward(weight, step)
        ctx.dtype = x.dtype
        return F.linear(x, _expanded(weight, step, x.dtype))

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Tensor, None, None]:
        weight, step = ctx.saved_tensors
        (slope,) = slopes
        return (slope @ _expanded(weight, step, slope.dtype)).to(ctx.dtype), None, None


def _expanded(weight: Tensor, step: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the weight (n, m) itself: a product with its 127 steps would overflow float16."""
    return weight.to(dtype).mul_(step.T)


def quantised(linear: nn.Linear, kind: str) -> nn.Linear:
    """Return a layer with the linear layer's weight (n, m) in int8 or nf4.

    That of bitsandbytes, nf4, stays in training mode, where it expands the weight and multiplies:
    in evaluation mode on a CPU it packs the weight for a kernel that knows no gradient.
    """
    if kind == "int8":
        return Int8Linear(linear).requires_grad_(False)
    from bitsandbytes.nn import Linear4bit, Params4bit

    n, m, bias = linear.out_features, linear.in_features, linear.bias is not None
    weight = linear.weight.detach()
    # Else the first input would decide what is computed in, which autocast makes float32.
    layer: nn.Linear = Linear4bit(
        m, n, bias, weight.dtype, quant_type="nf4", compress_statistics=False, device="meta"
    )
    four = Params4bit(
        weight, requires_grad=False, quant_type="nf4", compress_statistics=False, module=layer
    )
    layer.weight = four.to(weight.device)
    layer.bias = linear.bias
    return layer.requires_grad_(False).train()


def _probe(kind: str, device: torch.device) -> None:
    """Send numbers and a gradient through a scratch layer: a broken library shows itself
    only then."""
    scratch = quantised(nn.Linear(64, 64, device=device), kind)
    x = torch.ones((2, 64), device=device, requires_grad=True)
    scratch(x).sum().backward()
    if x.grad is None or not x.grad.isfinite().all():
        raise RuntimeError("no gradient")
