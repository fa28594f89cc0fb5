"""Measure whether two pictures show one person: dlib's face embedding, in torch.

The network is dlib's `dlib_face_recognition_resnet_model_v1` (King 2017), a ResNet-29 trained so
that embeddings of one person lie close: He et al., "Deep Residual Learning", 2016. B is the batch,
N the number of pictures.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from hdbcli.errors import HdbError
from hdbcli.faces.photo import align, find_faces, similarity

WEIGHTS = Path(__file__).parent / "assets" / "face_embedding.safetensors"
CHIP = 150  # pixels, the network's input
SAME_PERSON = 0.5  # distance below which two pictures are taken for one person

# Where dlib puts YuNet's five points, in its chip with a quarter of padding.
_TEMPLATE = np.array([[46.2, 47.9], [105.1, 48.6], [75.6, 79.5], [49.9, 102.8], [100.7, 103.5]])
_MEAN = (122.782, 117.001, 104.298)  # of dlib's training pictures, RGB
_FRAME = 6 / 64  # of the side: what a chip shows around the face and a tight crop does not
_BATCH = 32
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


class FaceEmbedding(nn.Module):
    """dlib's face embedding, frozen and differentiable with respect to the picture."""

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

    def forward(self, chips: Tensor) -> Tensor:
        """Embed aligned chips (see `chip`), (B, 3, 150, 150) RGB from 0 to 255, as (B, 128)."""
        if chips.shape[1:] != (3, CHIP, CHIP):
            raise ValueError(f"chips are (B, 3, {CHIP}, {CHIP}), not {tuple(chips.shape)}")
        x = self.stem((chips - self.mean) / 256).relu()
        x = F.max_pool2d(x, 3, 2)
        for block in self.blocks:
            x = block(x)
        return x.mean((2, 3)) @ self.fc


@functools.cache
def load_embedding(device: str = "cpu") -> FaceEmbedding:
    """Load the shipped network, once per process and device, in float32."""
    try:
        stored = load_file(WEIGHTS)
    except (OSError, SafetensorError) as error:
        raise HdbError(
            f"{WEIGHTS.name} does not load ({error}); reinstall hyperdreambooth"
        ) from None
    state = {"fc": _value(stored, "fc"), **_folded(stored, "conv32_down", "stem")}
    for index, name in enumerate(_BLOCKS):
        for conv in ("conv1", "conv2"):
            state |= _folded(stored, f"{name}/{conv}", f"blocks.{index}.{conv}")
    model = FaceEmbedding()
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


def chip(rgb: np.ndarray, landmarks: np.ndarray) -> np.ndarray:
    """Cut the face with these five points out of a picture as the network wants it, 150 px."""
    return align(rgb, landmarks, _TEMPLATE / CHIP, CHIP)


def embed(images: Sequence[np.ndarray]) -> tuple[Tensor, list[bool]]:
    """Embed the largest face of each RGB picture (H, W, 3) uint8; return (N, 128), and if found.

    Where the detector finds no face (some styles hide one from it), the whole picture is taken for
    a tight face crop: its border repeated by 6/64 of its side, then scaled to a chip.
    """
    chips, found = [], []
    for image in images:
        faces = find_faces(image)
        found.append(bool(faces))
        chips.append(chip(image, faces[0].landmarks) if faces else _whole(image))
    if not chips:
        return torch.zeros(0, 128), []
    pictures = torch.from_numpy(np.stack(chips)).permute(0, 3, 1, 2)
    model = load_embedding()
    with torch.no_grad():
        return torch.cat([model(part.float()) for part in pictures.split(_BATCH)]), found


def embed_aligned(images: Tensor, template: np.ndarray) -> Tensor:
    """Embed crops (B, 3, S, S) in -1..1 whose five points lie where `template` (5, 2) in 0..1 says:
    (B, 128). Nothing is looked for, which takes time, and gradients pass."""
    home = images.device
    if home.type == "mps":  # which knows no bicubic sampling in some versions, nor its gradient
        images = images.cpu()
    chips = aligned_chips(images, template)
    model = load_embedding(str(images.device))
    return torch.cat([model(part) for part in chips.split(_BATCH)]).to(home)


def aligned_chips(images: Tensor, template: np.ndarray) -> Tensor:
    """Cut chips (B, 3, 150, 150) from 0 to 255 out of such crops, differentiably."""
    images = images.float()  # a CPU resizes no bfloat16
    if images.shape[-1] > CHIP:  # the sampling below reads four pixels by four and no more
        images = F.interpolate(images, size=CHIP, mode="bilinear", antialias=True)
    side = images.shape[-1]
    turn, shift = similarity(template * side, _TEMPLATE)
    # torch counts from -1 to 1: the chip's point w shows the crop's point slope * w + start.
    half = 1 + 1j
    slope, start = CHIP / side / turn, (CHIP * half - 2 * shift) / (turn * side) - half
    matrix = [[slope.real, -slope.imag, start.real], [slope.imag, slope.real, start.imag]]
    where = torch.tensor(matrix, device=images.device).expand(len(images), 2, 3)
    with torch.autocast(images.device.type, enabled=False):  # in bfloat16 points would move
        grid = F.affine_grid(where, [len(images), 3, CHIP, CHIP], align_corners=False)
    chips = F.grid_sample(images, grid, mode="bicubic", padding_mode="border", align_corners=False)
    return ((chips + 1) * 127.5).clamp(0, 255)


def _whole(rgb: np.ndarray) -> np.ndarray:
    height, width = rgb.shape[:2]
    side = round(max(height, width) * (1 + 2 * _FRAME))
    top, left = (side - height) // 2, (side - width) // 2
    edges = (top, side - height - top, left, side - width - left)
    square = cv2.copyMakeBorder(rgb, *edges, cv2.BORDER_REPLICATE)
    filtering = cv2.INTER_AREA if side > CHIP else cv2.INTER_CUBIC
    return cv2.resize(square, (CHIP, CHIP), interpolation=filtering)


def distance(a: Tensor, b: Tensor) -> float:
    """Return the Euclidean distance of two embeddings (128,).

    Measured on rendered people: one person 0.28 +- 0.11, two 0.65 +- 0.08; on photos 0.31 to 0.44
    and 0.73 to 0.87. Below SAME_PERSON two pictures are taken for one person.
    """
    return float((a - b).norm())


def likeness(a: Tensor, b: Tensor) -> float:
    """Return 1 - distance, from 0 to 1: 1 is the same picture, above 0.5 the same person."""
    return max(0.0, 1 - distance(a, b))
