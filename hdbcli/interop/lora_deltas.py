"""What one layer of a LoRA file adds to the layer's weight W (n, m, ...), by the formulas of the
tools that write such files.

    LoRA, LoCon    dW = s up down                                Hu et al. 2021
    with a core    dW[n, m] = s sum over j, k of mid[j, k] up[n, j] down[k, m]
    LoHa           dW = s (w1_a w1_b) * (w2_a w2_b), elementwise     Hyeon-Woo et al. 2022, FedPara
    LoKr           dW = s kron(w1, w2), each perhaps a product too   Yeh et al. 2024, LyCORIS
    full, norms    dW = diff
    DoRA           W + dW = magnitude (W + d) / |W + d|, where d is one of the above
                                                                 Liu et al. 2024
    s = alpha / r
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from registry.errors import HdbError

Scale = Callable[[int | None], float]  # rank, None where there is none -> alpha / r


@dataclass(frozen=True, eq=False)
class Parts:
    """The tensors of one layer in a file, by part, as `lora_formats.split` names those."""

    path: str  # of the file, for messages
    layer: str  # as the file calls it
    tensors: Mapping[str, Tensor]

    def __contains__(self, part: str) -> bool:
        return part in self.tensors

    def __getitem__(self, part: str) -> Tensor:
        """Return a part in float32; HdbError if the file lacks it, or it is empty or one bare
        number."""
        tensor = self.tensors.get(part)
        if tensor is None or not tensor.numel() or not tensor.dim():
            raise HdbError(
                f"{self.path} is damaged: {self.layer!r} has no {part} matrix; get it again"
            )
        return tensor.float()

    def has(self, prefix: str) -> bool:
        return any(part.startswith(prefix) for part in self.tensors)


def shape_of(parts: Parts) -> torch.Size | None:
    """Return the shape of `update` without computing it: a small file can ask for more numbers
    than any memory holds."""
    tensors = {part: tensor.to("meta") for part, tensor in parts.tensors.items()}
    d = update(replace(parts, tensors=tensors), lambda _: 1.0)
    return None if d is None else d.shape


def update(parts: Parts, scale: Scale) -> Tensor | None:
    """Return d, scaled but not yet of the weight's shape, None where only the bias changes.

    HdbError where parts are missing or do not fit each other.
    """
    try:
        if parts.has("hada_"):
            halves = [_product(parts, f"hada_w{i}_a", f"hada_w{i}_b", f"hada_t{i}") for i in (1, 2)]
            return scale(len(parts["hada_w1_b"])) * halves[0] * halves[1]
        if parts.has("lokr_"):
            return _kronecker(parts, scale)
        if "down" in parts or "up" in parts:
            up, down = parts["up"].flatten(1), parts["down"].flatten(1)
            whole = _cored(parts["mid"], up.T, down) if "mid" in parts else up @ down
            return scale(len(down)) * whole
        for part in ("diff", "w_norm"):
            if part in parts:
                return parts[part]
    except (RuntimeError, IndexError) as error:  # torch, of shapes that do not fit
        raise HdbError(
            f"{parts.path} is damaged: the parts of {parts.layer!r} do not fit each other "
            f"({str(error).splitlines()[0][:100]}); get it again"
        ) from error
    if {*parts.tensors} <= {"alpha", "dora_scale", "magnitude"}:
        parts["down"]  # raises: these are nothing by themselves
    return None


def change(parts: Parts, d: Tensor | None, weight: Tensor) -> Tensor | None:
    """Return dW for a weight in float32, given d of any shape with as many numbers."""
    if "set_weight" in parts:
        return parts["set_weight"].view_as(weight) - weight
    if d is None:
        return None
    d = d.reshape(weight.shape)
    whole = next((part for part in ("magnitude", "dora_scale") if part in parts), None)
    return d if whole is None else _decomposed(weight + d, parts[whole], whole) - weight


def bias_change(parts: Parts, scale: Scale, bias: Tensor) -> Tensor | None:
    """Return what is added to a layer's bias (n), None if nothing is."""
    if "set_bias" in parts:
        return parts["set_bias"].view_as(bias) - bias
    if "up_bias" in parts:
        return scale(len(parts["down"])) * parts["up_bias"]
    return next((parts[part] for part in ("diff_b", "b_norm") if part in parts), None)


def _product(parts: Parts, left: str, right: str, core: str) -> Tensor:
    a, b = parts[left], parts[right]
    return _cored(parts[core], a, b) if core in parts else a @ b.flatten(1)


def _cored(core: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Return sum over j, k of core[j, k, ...] a[j, n] b[k, m]: a convolution by
    Tucker's decomposition."""
    return torch.einsum("jk...,jn,km->nm...", core, a, b)


def _kronecker(parts: Parts, scale: Scale) -> Tensor:
    halves, rank = [], None
    for half in ("lokr_w1", "lokr_w2"):
        if half in parts:
            halves.append(parts[half])
        else:
            halves.append(_product(parts, f"{half}_a", f"{half}_b", f"{half[:-2]}t{half[-1]}"))
            rank = len(parts[f"{half}_b"])
    first, second = halves
    first = first.view(*first.shape, *[1] * (second.dim() - 2))
    return scale(rank) * torch.kron(first, second.contiguous())


def _decomposed(weight: Tensor, magnitude: Tensor, part: str) -> Tensor:
    """Give the rows of a weight new lengths; LyCORIS may have measured its columns instead."""
    columns = part == "dora_scale" and magnitude.dim() > 1 and len(magnitude) == 1
    along = weight.transpose(0, 1) if columns else weight
    lengths = along.flatten(1).norm(dim=1).clamp_min(torch.finfo(weight.dtype).eps)
    ratio = (magnitude.view_as(lengths) / lengths).view(-1, *[1] * (weight.dim() - 1))
    return weight * (ratio.transpose(0, 1) if columns else ratio)
