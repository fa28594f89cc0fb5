"""Load a LoRA file into the base's own pipeline with diffusers, and compare what every target gets.

diffusers reads through PEFT, so what counts is the delta that its layers report, in each number
format that people run in.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from hdbcli.interop.lora_readers import Reading
from hdbcli.method.inject import eject
from hdbcli.method.lidb import Theta
from hdbcli.model.base import Base
from registry.checkpoints.ldm import canonical
from registry.errors import HdbError
from registry.stable_diffusion.uncompiled import quiet

RUNS_IN = {"fp32": torch.float32, "fp16": torch.float16}
# Largest |delta - U D| / (|U| |D|): what rounding in a format, of file or pipeline, can do.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3}


def require_peft() -> None:
    """Raise HdbError, before any work, where diffusers could not load a LoRA at all."""
    if find_spec("peft") is None:
        raise HdbError(
            "--check loads the file with diffusers, which needs peft for it; pip install peft, or "
            "export without --check"
        )


def load_for_real(base: Base, theta: Theta, tensors: Mapping[str, Tensor]) -> list[Reading]:
    """Return a reading for each number format; the base in memory is used up.

    A target counts when its delta is the identity's dW as far as the formats can say it.
    """
    pipeline: Any = getattr(base.backbone, "pipeline", None)
    total = len(base.injected.layers)
    if not hasattr(pipeline, "load_lora_weights"):
        why = f"{base.spec.name} is not a diffusers pipeline that loads LoRA files"
        return [Reading("diffusers", 0, total, problem=why, asked=False)]
    factors = base.injected.factors(theta)
    triples = zip(base.injected.layers, factors.up, factors.down, strict=True)
    wanted = {name: (up[0].float().cpu(), down[0].float().cpu()) for name, up, down in triples}
    eject(base.backbone.components)
    file_dtype = next((t.dtype for t in tensors.values() if t.dim() > 1), torch.float32)
    readings = []
    for name, dtype in RUNS_IN.items():
        tolerance = max(TOLERANCE[dtype], TOLERANCE.get(file_dtype, 0))
        with quiet():
            pipeline.to("cpu", dtype)
            reading = _loaded(f"diffusers {name}", base, pipeline, tensors, wanted, tolerance)
        readings.append(reading)
    return readings


def _loaded(
    reader: str,
    base: Base,
    pipeline: Any,
    tensors: Mapping[str, Tensor],
    wanted: Mapping[str, tuple[Tensor, Tensor]],
    tolerance: float,
) -> Reading:
    """Load, measure every layer one by one, and take the file out of the pipeline again."""
    right, unread = set(), []
    try:
        pipeline.load_lora_weights(dict(tensors))
        for component, module in base.backbone.components.items():
            for path, layer in module.named_modules():
                if not hasattr(layer, "get_delta_weight"):  # PEFT's, which hdb itself does without
                    continue
                name = f"{component}.{canonical(component, path)}"
                if name not in wanted:
                    unread.append(name)
                elif _same(layer, *wanted[name], tolerance):
                    right.add(name)
    except (ValueError, KeyError, IndexError, AttributeError, TypeError, RuntimeError) as error:
        # What diffusers says of a file it does not understand: it has no error of its own.
        said = " ".join(str(error).split())[:200]
        return Reading(reader, 0, len(wanted), tuple(wanted), problem=f"refuses it: {said}")
    finally:
        pipeline.unload_lora_weights()
    lost = tuple(name for name in wanted if name not in right)
    return Reading(reader, len(right), len(wanted), lost, tuple(unread))


def _same(layer: Any, up: Tensor, down: Tensor, tolerance: float) -> bool:
    """Say whether PEFT adds up @ down (n, m) to a layer's weight."""
    (adapter,) = layer.active_adapters
    delta = layer.get_delta_weight(adapter).detach().float().cpu().flatten(1)
    return bool((delta - up @ down).norm() <= tolerance * up.norm() * down.norm() + 1e-7)
