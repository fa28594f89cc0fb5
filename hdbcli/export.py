"""Export an identity as a plain LoRA, which other tools read without knowing hdb.

dW = U @ D becomes lora_up = U (n, R) and lora_down = D (R, m), one rank for all targets and alpha =
rank, which every reader takes for a scale of 1. `kohya` keys are what A1111, Forge, ComfyUI,
InvokeAI and diffusers read; `diffusers` keys are PEFT's.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save, save_file
from torch import Tensor

from hdbcli.base import Base
from hdbcli.errors import HdbError
from hdbcli.lidb import Theta
from registry.errors import RegistryError
from registry.store import write_beside

DTYPES = {"fp16": torch.float16, "fp32": torch.float32}
_SHORT = {"unet": "unet", "text_encoder": "te", "text_encoder_2": "te2"}


def export_tensors(base: Base, theta: Theta, form: str, dtype: str) -> dict[str, Tensor]:
    """Return the tensors of a LoRA file by key; computed in float32, cast once at the end."""
    if form not in _FORMATS:
        raise HdbError(f"unknown format {form!r}; choose {' or '.join(_FORMATS)}")
    if dtype not in DTYPES:
        raise HdbError(f"unknown dtype {dtype!r}; choose {' or '.join(DTYPES)}")
    factors = base.injected.factors(theta)
    tensors: dict[str, Tensor] = {}
    pairs = zip(base.injected.layers, factors.down, factors.up, strict=True)
    for name, down, up in pairs:
        component, _, path = name.partition(".")
        parts = _FORMATS[form](component, path, down[0].float().cpu(), up[0].float().cpu())
        tensors |= {key: value.to(DTYPES[dtype]).contiguous() for key, value in parts.items()}
    if not all(tensor.isfinite().all() for tensor in tensors.values()):
        raise HdbError(f"the residuals do not fit {dtype}; export with --dtype fp32")
    return tensors


def export(base: Base, theta: Theta, name: str, form: str, dtype: str, path: Path) -> int:
    """Write a LoRA file and return its bytes."""
    tensors = export_tensors(base, theta, form, dtype)
    metadata = _metadata(base, theta.rank, name, tensors)
    try:
        with write_beside(path) as beside:
            save_file(tensors, beside, metadata=metadata)
    except RegistryError as error:
        raise HdbError(str(error)) from error
    return path.stat().st_size


def _kohya(component: str, path: str, down: Tensor, up: Tensor) -> dict[str, Tensor]:
    stem = f"lora_{_SHORT.get(component, component)}_{path.replace('.', '_')}"
    alpha = torch.tensor(float(len(down)))
    return {f"{stem}.lora_down.weight": down, f"{stem}.lora_up.weight": up, f"{stem}.alpha": alpha}


def _diffusers(component: str, path: str, down: Tensor, up: Tensor) -> dict[str, Tensor]:
    stem = f"{component}.{path}"
    return {f"{stem}.lora_A.weight": down, f"{stem}.lora_B.weight": up}


_FORMATS: dict[str, Callable[[str, str, Tensor, Tensor], dict[str, Tensor]]] = {
    "kohya": _kohya,
    "diffusers": _diffusers,
}


def _metadata(base: Base, rank: int, name: str, tensors: dict[str, Tensor]) -> dict[str, str]:
    """Say what readers ask for, as strings; no path, no photo, no thumbnail."""
    content = save(tensors)
    start = 8 + int.from_bytes(content[:8], "little")  # metadata edits must not change the hash
    digest = hashlib.sha256(content[start:]).hexdigest()
    side = base.spec.resolution
    return {
        "format": "pt",
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(rank),
        "ss_network_alpha": str(rank),
        "ss_output_name": name,
        "sshs_model_hash": digest,
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": f"{base.spec.family}/lora",
        "modelspec.implementation": "diffusers",
        "modelspec.title": name,
        "modelspec.resolution": f"{side}x{side}",
        "modelspec.trigger_phrase": base.spec.identifier,
        "modelspec.hash_sha256": f"0x{digest}",
        "hdb.base": base.spec.name,
        "hdb.base_digest": base.injected.weights_digest(),
    }
