"""Export an identity as a plain LoRA, which other tools read without knowing hdb.

dW = U @ D becomes lora_up = U (n, R) and lora_down = D (R, m), one rank for all targets and alpha =
rank, which every reader takes for a scale of 1. Those of a convolution are convolutions, as in
LyCORIS' LoCon: lora_down (R, c, h, w) and lora_up (n, R, 1, 1). `kohya` keys are what A1111, Forge,
ComfyUI, InvokeAI and diffusers read; `diffusers` keys are PEFT's.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor

from hdbcli.interop.diffusers_reader import load_for_real
from hdbcli.interop.lora_readers import Reading, replay
from hdbcli.method.lidb import Theta
from hdbcli.model.base import Base
from registry.bases.settings import predicts
from registry.checkpoints.ldm import LAYOUTS, architecture_of, original_layer
from registry.checkpoints.safetensors import read_tensors, save_tensors
from registry.errors import HdbError, UsageError
from registry.files import write_beside

DTYPES = {"fp16": torch.float16, "fp32": torch.float32}
# Readers that a format is meant for, by how their names start.
MEANT_FOR = {"kohya": ("diffusers", "ComfyUI", "A1111", "InvokeAI"), "diffusers": ("diffusers",)}
_SHORT = {"unet": "unet", "text_encoder": "te", "text_encoder_2": "te2"}


def export_tensors(base: Base, theta: Theta, form: str, dtype: str) -> dict[str, Tensor]:
    """Return the tensors of a LoRA file by key; computed in float32, cast once at the end."""
    if form not in _FORMATS:
        raise UsageError(f"unknown format {form!r}; choose {' or '.join(_FORMATS)}")
    if dtype not in DTYPES:
        raise UsageError(f"unknown dtype {dtype!r}; choose {' or '.join(DTYPES)}")
    factors = base.injected.factors(theta)
    tensors: dict[str, Tensor] = {}
    stems = stem_names(base, form)
    pairs = zip(base.injected.layers, factors.down, factors.up, strict=True)
    for name, down, up in pairs:
        layer = base.injected.layers[name]
        matrices = layer.as_weights(down[0].float().cpu(), up[0].float().cpu())
        parts = _FORMATS[form](stems[name], *matrices)
        tensors |= {key: value.to(DTYPES[dtype]).contiguous() for key, value in parts.items()}
    if not all(tensor.isfinite().all() for tensor in tensors.values()):
        raise HdbError(f"the residuals do not fit {dtype}; export with --dtype fp32")
    return tensors


def export(
    base: Base, theta: Theta, name: str, form: str, dtype: str, path: Path, check: bool = False
) -> tuple[int, list[Reading]]:
    """Write a LoRA file; return its bytes and, with `check`, what every reader makes of it.

    A file that a reader it is meant for would not apply in full is not kept: HdbError. The check
    uses the base in memory up.
    """
    tensors = export_tensors(base, theta, form, dtype)
    metadata = _metadata(base, theta.rank, name, tensors)
    readings: list[Reading] = []
    with write_beside(path) as beside:
        save_tensors(tensors, beside, metadata)
        if check:
            readings = read_by_all(base, theta, read_tensors(beside)[1])
            refuse_unread(readings, form)
    return path.stat().st_size, readings


def read_by_all(base: Base, theta: Theta, tensors: Mapping[str, Tensor]) -> list[Reading]:
    """Ask every reader what it makes of a file's tensors; the base in memory is used up."""
    rules = replay(base, tensors)  # first: diffusers takes the LiDB layers out
    return load_for_real(base, theta, tensors) + rules


def refuse_unread(readings: Sequence[Reading], form: str) -> None:
    """Raise HdbError if a reader that `form` is meant for would not apply all of the file."""
    for reading in readings:
        if reading.ok or not reading.asked or not reading.reader.startswith(MEANT_FOR[form]):
            continue
        first = f", the first lost is {reading.lost[0]}" if reading.lost else ""
        if reading.unread:
            first += f", {len(reading.unread)} keys are none of them, such as {reading.unread[0]}"
        raise HdbError(
            f"{reading.reader} {reading.problem or 'would not apply it all'}: {reading.mapped} of "
            f"{reading.total} targets map{first}; nothing was written; please report this"
        )


def stem_names(base: Base, form: str) -> dict[str, str]:
    """Name each target as `form` does; HdbError where two would get one name."""
    shorts = dict(_SHORT)
    if "text_encoder_2" in base.backbone.components:
        shorts["text_encoder"] = "te1"  # with a second one, every reader counts from 1
    stems: dict[str, str] = {}
    for name in base.injected.layers:
        component, _, path = name.partition(".")
        if component == "unet" and base.spec.family == "sdxl":
            # kohya trains that in the original code, whose names its scripts know alone.
            path = original_layer("sdxl", path) or path
        flat = f"lora_{shorts.get(component, component)}_{path.replace('.', '_')}"
        stem = name if form == "diffusers" else flat
        if stem in stems.values():
            raise HdbError(f"two targets of {base.spec.name} would be named {stem!r} in {form}")
        stems[name] = stem
    return stems


def _kohya(stem: str, down: Tensor, up: Tensor) -> dict[str, Tensor]:
    alpha = torch.tensor(float(len(down)))
    return {f"{stem}.lora_down.weight": down, f"{stem}.lora_up.weight": up, f"{stem}.alpha": alpha}


def _diffusers(stem: str, down: Tensor, up: Tensor) -> dict[str, Tensor]:
    return {f"{stem}.lora_A.weight": down, f"{stem}.lora_B.weight": up}


_FORMATS: dict[str, Callable[[str, Tensor, Tensor], dict[str, Tensor]]] = {
    "kohya": _kohya,
    "diffusers": _diffusers,
}


def _metadata(base: Base, rank: int, name: str, tensors: dict[str, Tensor]) -> dict[str, str]:
    """Say what readers ask for, as strings; no path, no photo, no thumbnail."""
    content = save(tensors)
    start = 8 + int.from_bytes(content[:8], "little")  # metadata edits must not change the hash
    digest = hashlib.sha256(content[start:]).hexdigest()
    side, family = base.spec.resolution, base.spec.family
    # A1111 takes a LoRA that does not say what it is for for one of Stable Diffusion 1.
    known = {"ss_base_model_version": LAYOUTS[family].version} if family in LAYOUTS else {}
    return known | {
        "ss_v2": str(family == "sd2"),
        "format": "pt",
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(rank),
        "ss_network_alpha": str(rank),
        "ss_output_name": name,
        "sshs_model_hash": digest,
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": f"{architecture_of(family, predicts(base.spec.name))}/lora",
        "modelspec.implementation": "diffusers",
        "modelspec.title": name,
        "modelspec.resolution": f"{side}x{side}",
        "modelspec.trigger_phrase": base.spec.identifier,
        "modelspec.hash_sha256": f"0x{digest}",
        "hdb.base": base.spec.name,
        "hdb.base_digest": base.injected.weights_digest(),
    }
