"""Hold frozen linear layers in 8 or 4 bits by bitsandbytes; where that does not work, leave them as
they are and say so.

Dettmers et al. 2022 (LLM.int8()) and 2023 (QLoRA, nf4). Gradients flow through the layers to what
lies before them, not into them.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from hdbcli.device import give_back_memory


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


def quantised(linear: nn.Linear, kind: str) -> nn.Linear:
    """Return a bitsandbytes layer with the linear layer's weight (n, m) in int8 or nf4.

    It stays in training mode, where bitsandbytes expands the weight and multiplies; on a GPU it
    rounds activations too (int8). So it would in evaluation mode on a CPU, or pack the weight for a
    kernel that knows no gradient (nf4).
    """
    from bitsandbytes.nn import Int8Params, Linear4bit, Linear8bitLt, Params4bit

    n, m, bias = linear.out_features, linear.in_features, linear.bias is not None
    weight = linear.weight.detach()
    layer: nn.Linear
    if kind == "int8":
        layer = Linear8bitLt(m, n, bias, has_fp16_weights=False, device="meta")
        # On its way from the CPU it is quantised, and only then.
        eight = Int8Params(weight.cpu(), requires_grad=False, has_fp16_weights=False)
        layer.weight = eight.to(weight.device)
    else:
        # Else the first input would decide what is computed in, which autocast makes float32.
        layer = Linear4bit(
            m, n, bias, weight.dtype, quant_type="nf4", compress_statistics=False, device="meta"
        )
        four = Params4bit(
            weight, requires_grad=False, quant_type="nf4", compress_statistics=False, module=layer
        )
        layer.weight = four.to(weight.device)
    layer.bias = linear.bias
    return layer.requires_grad_(False).train()


def _probe(kind: str, device: torch.device) -> None:
    """Send numbers and a gradient through a scratch layer: a broken library shows itself only
    then."""
    scratch = quantised(nn.Linear(64, 64, device=device), kind)
    x = torch.ones((2, 64), device=device, requires_grad=True)
    scratch(x).sum().backward()
    assert x.grad is not None and bool(x.grad.isfinite().all()), "no gradient"
