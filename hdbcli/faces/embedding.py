"""Measure whether two pictures show one person: dlib's face embedding, in torch.

The network is dlib's `dlib_face_recognition_resnet_model_v1` (King 2017), a ResNet-29 trained so
that embeddings of one person lie close: He et al., "Deep Residual Learning", 2016. B is the batch,
N the number of pictures.
"""

from __future__ import annotations

import functools
import hashlib
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from hdbcli.faces.photo import align, find_faces, similarity
from registry.errors import HdbError

WEIGHTS = Path(__file__).parent / "assets" / "face_embedding.safetensors"
CHIP = 150  # pixels, the network's input
SAME_PERSON = 0.5  # distance below which two pictures are taken for one person

# Where dlib puts YuNet's five points, in its chip with a quarter of padding.
_TEMPLATE = np.array([[46.2, 47.9], [105.1, 48.6], [75.6, 79.5], [49.9, 102.8], [100.7, 103.5]])
_MEAN = (122.782, 117.001, 104.298)  # of dlib's training pictures, RGB
_BATCH = 32
_REMEMBERED = 4096  # pictures
_SEEN: dict[bytes, np.ndarray | None] = {}
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
        """Embed aligned chips (B, 3, 150, 150) RGB from 0 to 255, as (B, 128)."""
        if chips.shape[1:] != (3, CHIP, CHIP):
            raise ValueError(f"chips are (B, 3, {CHIP}, {CHIP}), not {tuple(chips.shape)}")
        (last,) = deque(self.features(chips), maxlen=1)
        return self.embedding(last)

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


def embed(images: Sequence[np.ndarray]) -> Tensor:
    """Embed the largest face of each RGB picture (H, W, 3) uint8, aligned by its own landmarks:
    (N, 128); a row of NaN where the detector finds no face."""
    return at_landmarks(images, _TEMPLATE / CHIP, CHIP, load_embedding(), 128)


def at_landmarks(
    images: Sequence[np.ndarray],
    template: np.ndarray,
    size: int,
    model: Callable[[Tensor], Tensor],
    width: int,
) -> Tensor:
    """Align the largest face of each picture (H, W, 3) uint8 to a recogniser's `template` (5, 2),
    `size` pixels square, and embed it with `model`: (N, width).

    A picture in which the detector finds no face gets a row of NaN: whoever judges counts it as
    a miss.
    """
    told = torch.full((len(images), width), torch.nan)
    chips = {}
    for index, image in enumerate(images):
        if (points := landmarks(image)) is not None:
            chips[index] = align(image, points, template, size)
    if chips:
        pictures = torch.from_numpy(np.stack(list(chips.values()))).permute(0, 3, 1, 2)
        with torch.no_grad():
            rows = [model(part.float()) for part in pictures.split(_BATCH)]
        told[list(chips)] = torch.cat(rows)
    return told


def landmarks(image: np.ndarray) -> np.ndarray | None:
    """Return the five points (5, 2) of the largest face of a picture, or None without a face.

    The last few thousand answers are kept: looking takes longer than embedding, and several
    recognisers judge the same pictures.
    """
    key = hashlib.sha256(repr(image.shape).encode() + image.tobytes()).digest()
    if key not in _SEEN:
        if len(_SEEN) >= _REMEMBERED:
            _SEEN.clear()
        faces = find_faces(image)
        _SEEN[key] = faces[0].landmarks if faces else None
    return _SEEN[key]


def found(embeddings: Tensor) -> Tensor:
    """Return which embeddings (..., D) are of a face that was found: (...)."""
    return embeddings.isfinite().all(-1)


def embed_aligned(images: Tensor, template: np.ndarray) -> Tensor:
    """Embed crops (B, 3, S, S) in -1..1 whose five points lie where `template` (5, 2) in 0..1 says,
    or (B, 5, 2) of each: (B, 128). Nothing is looked for, which takes time, and gradients pass."""
    home = images.device
    chips = aligned_chips(images, template)
    model = load_embedding(str(chips.device))
    return torch.cat([model(part) for part in chips.split(_BATCH)]).to(home)


def aligned_chips(images: Tensor, template: np.ndarray) -> Tensor:
    """Cut chips (B, 3, 150, 150) from 0 to 255 out of such crops, differentiably; on the CPU where
    a device cannot."""
    if images.device.type == "mps":  # which knows no bicubic sampling in some versions
        images = images.cpu()
    images = images.float()  # a CPU resizes no bfloat16
    if images.shape[-1] > CHIP:  # the sampling below reads four pixels by four and no more
        images = F.interpolate(images, size=CHIP, mode="bilinear", antialias=True)
    side = images.shape[-1]
    matrices = []
    for points in np.reshape(template, (-1, 5, 2)):
        turn, shift = similarity(points * side, _TEMPLATE)
        # torch counts from -1 to 1: the chip's point w shows the crop's point slope * w + start.
        half = 1 + 1j
        slope, start = CHIP / side / turn, (CHIP * half - 2 * shift) / (turn * side) - half
        matrix = [[slope.real, -slope.imag, start.real], [slope.imag, slope.real, start.imag]]
        matrices.append(matrix)
    where = torch.tensor(matrices, device=images.device).expand(len(images), 2, 3)
    with torch.autocast(images.device.type, enabled=False):  # in bfloat16 points would move
        grid = F.affine_grid(where, [len(images), 3, CHIP, CHIP], align_corners=False)
    chips = F.grid_sample(images, grid, mode="bicubic", padding_mode="border", align_corners=False)
    return ((chips + 1) * 127.5).clamp(0, 255)
