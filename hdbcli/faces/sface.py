"""SFace, a second face recogniser, in torch.

A MobileNet (Howard et al. 2017) that Zhong et al. ("SFace: Sigmoid-Constrained Hypersphere Loss for
Robust Face Recognition", 2021) trained to lay people apart on a sphere; OpenCV's model zoo
publishes it. It tells people further apart than dlib's does. B is the batch.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from hdbcli.faces.recogniser import ASSETS, Recogniser, read_network

WEIGHTS = ASSETS / "sface.safetensors"
# (width, stride) of the pointwise and depthwise convolutions of each block, after a stem of 32.
BLOCKS = (
    *((64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2)),
    *((512, 1), (512, 1), (512, 1), (512, 1), (512, 1), (1024, 2), (1024, 1)),
)
STEM, CELLS = 32, 7  # channels of the first convolution; cells of the last block's side


class SFace(Recogniser):
    """The network, frozen: chips of 112 pixels, and embeddings of length 1."""

    side = 112
    # Where the five points lie in chips that most recognisers since ArcFace were trained on.
    template = np.array([[38.3, 51.7], [73.5, 51.5], [56.0, 71.7], [41.5, 92.4], [70.7, 92.2]])
    compared = 4, 10, 12  # the last of 256, 512 and 1024 channels
    fc: Tensor
    fc_bias: Tensor
    fc_scale: Tensor  # of what goes in, by channel

    def __init__(self) -> None:
        super().__init__()
        inputs = 3
        for name, width, _, groups in layers():
            kernel = 1 if name.endswith("pointwise") else 3
            shape = width, inputs // groups, kernel, kernel
            weight = torch.empty(shape, memory_format=torch.channels_last)
            self.register_buffer(f"{name}_weight", weight)
            self.register_buffer(f"{name}_bias", torch.empty(width))
            self.register_buffer(f"{name}_slope", torch.empty(width))
            inputs = width
        self.register_buffer("fc", torch.empty(128, inputs * CELLS**2))
        self.register_buffer("fc_bias", torch.empty(128))
        self.register_buffer("fc_scale", torch.empty(inputs))

    def features(self, pictures: Tensor) -> Iterator[Tensor]:
        """Yield what each block in turn makes (B, c, h, w) of pictures from 0 to 255."""
        x = ((pictures - 127.5) / 128).contiguous(memory_format=torch.channels_last)
        for name, _, stride, groups in layers():
            weight, bias, slope = (
                getattr(self, f"{name}_{part}") for part in ("weight", "bias", "slope")
            )
            padding = weight.shape[-1] // 2
            if stride > 1:  # which takes a CPU ten times as long backwards in bfloat16
                with torch.autocast(x.device.type, enabled=False):
                    y = F.conv2d(x.float(), weight, bias, stride, padding, 1, groups)
                x = y.to(x.dtype)
            else:
                x = F.conv2d(x, weight, bias, stride, padding, 1, groups)
            x = FrozenPReLU.apply(x, slope.to(x))
            if name.endswith("pointwise"):
                yield x

    def embedding(self, last: Tensor) -> Tensor:
        """Return the embeddings (B, 128), of length 1, that the last block's features say."""
        scaled = (last * self.fc_scale[:, None, None]).flatten(1)
        return F.normalize(F.linear(scaled, self.fc, self.fc_bias).float(), dim=1)


class FrozenPReLU(torch.autograd.Function):
    """A PReLU (He et al. 2015) of x (B, c, h, w) and slopes (c,) that are not learned.

    Torch's own takes gradients of the slopes as well, and four times as long backwards.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, slope: Tensor) -> Tensor:
        ctx.save_for_backward(x, slope)
        return F.prelu(x, slope)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        x, slope = ctx.saved_tensors
        above: Tensor = torch.ops.aten.threshold_backward(grad, x, 0)
        return above.lerp(grad, slope[:, None, None]), None


def layers() -> Iterator[tuple[str, int, int, int]]:
    """Yield name, width, stride and groups of each convolution."""
    yield "stem", STEM, 1, 1
    inputs = STEM
    for number, (width, stride) in enumerate(BLOCKS):
        yield f"block{number}_depthwise", inputs, stride, inputs
        yield f"block{number}_pointwise", width, 1, 1
        inputs = width


@functools.cache
def load_sface(device: str = "cpu") -> SFace:
    """Load the shipped network, once per process and device, in float32."""
    stored = read_network(WEIGHTS)
    state = {name: value for name, value in stored.items() if value.is_floating_point()}
    for name, levels in stored.items():
        if not levels.is_floating_point():
            state[name] = restored(levels, state.pop(f"{name}#scale"), state.pop(f"{name}#min"))
    model = SFace()
    model.load_state_dict(state)
    return model.eval().to(device)


def restored(levels: Tensor, scale: Tensor, least: Tensor) -> Tensor:
    """Return what levels (O, ...) uint8 stand for, each of O rows by its own scale and least value;
    two of 16 levels in one byte where the tensor has two dimensions."""
    if levels.ndim == 2:
        levels = torch.stack([levels & 15, levels >> 4], 2).flatten(1)
    row = (len(levels), *[1] * (levels.ndim - 1))
    return levels * scale.view(row) + least.view(row)
