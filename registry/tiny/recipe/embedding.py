"""Convert dlib's face descriptor, as face-api publishes it, to the safetensors file that ships.

Source: npm `@vladmandic/face-api` 1.7.15, a uint8-quantised copy of dlib's
`dlib_face_recognition_resnet_model_v1`, whose author gave the weights to the public domain.
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

from registry.errors import HdbError

MANIFEST = "face_recognition_model-weights_manifest.json"
WEIGHTS = "face_recognition_model.bin"
ABOUT = {
    "format": 1,
    "source": f"npm @vladmandic/face-api 1.7.15, package/model/{WEIGHTS}",
    "source_sha256": "b413e420d6840b2775fba32008db6f3cddb07d485967fb42cfcf379c16a8c589",
    "licence": "MIT (face-api); the weights: public domain (Davis King, dlib)",
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
    digest = hashlib.sha256(raw).hexdigest()
    if digest != ABOUT["source_sha256"]:
        raise HdbError(
            f"{manifest.with_name(WEIGHTS)} has sha256 {digest}, the recipe was written for "
            f"{ABOUT['source_sha256']}; take it from {ABOUT['source']}"
        )
    tensors = _tensors([entry for group in layout for entry in group["weights"]], raw)
    # One metadata key: safetensors writes several in random order, and then no two files are equal.
    data = save(tensors, metadata={"about": json.dumps(ABOUT)})
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
