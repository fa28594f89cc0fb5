"""dlib's face recogniser, in torch.

`dlib_face_recognition_resnet_model_v1` (King 2017): a ResNet-29 (He et al., "Deep Residual
Learning", 2016), trained so that embeddings of one person lie close. B is the batch.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hdbcli.faces.recogniser import ASSETS, Recogniser, read_network

WEIGHTS = ASSETS / "face_embedding.safetensors"

_MEAN = (122.782, 117.001, 104.298)  # of dlib's training pictures, RGB
# Names as in the weights file; the number is the width.
_BLOCKS = (
    *("conv32_1", "conv32_2", "conv32_3"),
    *("conv64_down", "conv64_1", "conv64_2", "conv64_3"),
    *("conv128_down", "conv128_1", "conv128_2"),
    *("conv256_down", "conv256_1", "conv256_2", "conv256_down_out"),
)


class _Conv(nn.Module):
    """A frozen convolution: buffers, so that no optimizer and no parameter count sees it."""

    weight: Tensor
    bias: Tensor

    def __init__(self, inputs: int, width: int, kernel: int, stride: int, padding: int) -> None:
        super().__init__()
        self.stride, self.padding = stride, padding
        self.register_buffer("weight", torch.empty(width, inputs, kernel, kernel))
        self.register_buffer("bias", torch.empty(width))

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight, self.bias, self.stride, self.padding)


class _Block(nn.Module):
    """Two convolutions and a shortcut, which halves by average and widens by zeros."""

    def __init__(self, inputs: int, width: int, down: bool) -> None:
        super().__init__()
        self.down = down
        self.conv1 = _Conv(inputs, width, 3, 2 if down else 1, 0 if down else 1)
        self.conv2 = _Conv(width, width, 3, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv2(self.conv1(x).relu())
        if self.down:
            x = F.avg_pool2d(x, 2)
            # Without padding the convolution may end a row short of the average; dlib adds zeros.
            y = F.pad(y, (0, x.shape[3] - y.shape[3], 0, x.shape[2] - y.shape[2]))
            x = F.pad(x, (0, 0, 0, 0, 0, y.shape[1] - x.shape[1]))
        return (x + y).relu()


class Dlib(Recogniser):
    """The network, frozen: chips of 150 pixels."""

    side = 150
    # Where dlib puts YuNet's five points, in its chip with a quarter of padding.
    template = np.array([[46.2, 47.9], [105.1, 48.6], [75.6, 79.5], [49.9, 102.8], [100.7, 103.5]])
    compared = 6, 9, 12  # the last of 64, 128 and 256 channels
    fc: Tensor
    mean: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.stem = _Conv(3, 32, 7, 2, 0)
        widths = [int(name.removeprefix("conv").split("_")[0]) for name in _BLOCKS]
        self.blocks = nn.ModuleList(
            _Block(inputs, width, "down" in name)
            for name, inputs, width in zip(_BLOCKS, [32, *widths[:-1]], widths, strict=True)
        )
        self.register_buffer("fc", torch.empty(256, 128))
        self.register_buffer("mean", torch.tensor(_MEAN)[:, None, None], persistent=False)

    def embedding(self, last: Tensor) -> Tensor:
        """Return the embeddings (B, 128) that the last block's features say."""
        return last.mean((2, 3)) @ self.fc

    def features(self, pictures: Tensor) -> Iterator[Tensor]:
        """Yield what each block in turn makes (B, c, h, w) of pictures of any size, (B, 3, H, W)
        RGB from 0 to 255."""
        x = self.stem((pictures - self.mean) / 256).relu()
        x = F.max_pool2d(x, 3, 2)
        for block in self.blocks:
            x = block(x)
            yield x


@functools.cache
def load_dlib(device: str = "cpu") -> Dlib:
    """Load the shipped network, once per process and device, in float32."""
    stored = read_network(WEIGHTS)
    state = {"fc": _value(stored, "fc"), **_folded(stored, "conv32_down", "stem")}
    for index, name in enumerate(_BLOCKS):
        for conv in ("conv1", "conv2"):
            state |= _folded(stored, f"{name}/{conv}", f"blocks.{index}.{conv}")
    model = Dlib()
    model.load_state_dict(state)
    return model.eval().to(device)


def _value(stored: dict[str, Tensor], name: str) -> Tensor:
    """Return a stored tensor in float32; most are uint8 with a scale and a minimum."""
    value = stored[name]
    if value.dtype == torch.uint8:
        return value * stored[f"{name}#scale"] + stored[f"{name}#min"]
    return value


def _folded(stored: dict[str, Tensor], source: str, name: str) -> dict[str, Tensor]:
    """Return a convolution with the scale and shift that follow it in dlib multiplied in."""
    kinds = ("conv/filters", "conv/bias", "scale/weights", "scale/biases")
    filters, bias, scale, shift = (_value(stored, f"{source}/{kind}") for kind in kinds)
    weight = filters * scale[:, None, None, None]
    return {f"{name}.weight": weight, f"{name}.bias": bias * scale + shift}
