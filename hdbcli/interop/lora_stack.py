"""Stack LoRA files of other tools on a base's weights: styles and few-step models, under the
LiDB layers of identities.

W + strength x dW replaces the weight of a layer; LiDB layers add their residual beside it. What dW
is depends on the kind of file, see `lora_deltas`; here are the names that each tool gives layers,
and the places where it keeps alpha.
"""

from __future__ import annotations

import json
import math
import os
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import regex
import torch
from torch import Tensor, nn

from hdbcli.interop import lora_deltas
from hdbcli.interop.lora_deltas import Parts
from hdbcli.interop.lora_readers import WIDTHS, attention_of_old
from hdbcli.method.lidb import LiDBLayer
from hdbcli.model.base import Base
from registry.checkpoints.ldm import canonical, original_layer
from registry.checkpoints.lora_formats import PEFT, architecture, lora_style, other_adapter, split
from registry.checkpoints.safetensors import SHA256, Header, read_header
from registry.errors import HdbError, HdbWarning, UsageError
from registry.files import sha256_of
from registry.spec import BaseSpec, FewSteps, SampleSettings
from registry.stable_diffusion.few_steps import few_steps
from registry.store import shown

LARGEST = 2**34  # bytes of a file; a LoRA of Stable Diffusion XL has up to 2e9
SHORTS = {"unet": ("unet",), "text_encoder": ("te", "te1"), "text_encoder_2": ("te2",)}
CLIPS = {"text_encoder": ("clip_l", "clip_h"), "text_encoder_2": ("clip_g",)}  # ComfyUI's names
# What a trainer's folder calls the file itself: PEFT, diffusers.
FILES = ("adapter_model.safetensors", "pytorch_lora_weights.safetensors")
ADAPTER = "lora_adapter_metadata"  # where diffusers keeps the alpha that its keys do not have
CONFIG = "adapter_config.json"  # where PEFT does, beside the file
# What PEFT takes off the base's own weights before it trains, and again when it loads such a file.
MOVES_BASE = re.compile(r"pissa|olora|corda|lora_ga", re.IGNORECASE)
SECONDS = 1.0  # that a file's own regular expressions may take for one layer

Layer: TypeAlias = nn.Linear | nn.Conv2d | nn.GroupNorm | nn.LayerNorm


@dataclass(frozen=True, eq=False)
class Lora:
    """One file: tensors by key, what it says of its alpha, and how strongly it is added."""

    path: Path
    strength: float
    digest: str  # twelve hex digits, as A1111 writes them
    tensors: Mapping[str, Tensor]
    adapter: Mapping[str, Any]
    few_steps: FewSteps | None = None  # how a base with it is sampled, by the names that it has


@dataclass(frozen=True, eq=False)
class Stacked:
    """What became of a file: how many layers it changed, and its keys that name no layer."""

    lora: Lora
    layers: int
    unread: tuple[str, ...]

    @property
    def problem(self) -> str:
        """Say which keys were left out, empty if none."""
        if not self.unread:
            return ""
        count = f"{len(self.unread)} of {len(self.lora.tensors)} keys"
        return f"{self.lora.path}: {count} name no layer of this base, such as {self.unread[0]!r}"

    def facts(self) -> dict[str, Any]:
        """Return what `hdb gen --json` prints."""
        lora = self.lora
        known = {"name": shown(lora.path), "path": lora.path, "strength": lora.strength}
        return {**known, "hash": lora.digest, "layers": self.layers, "unread": len(self.unread)}


def read(text: str) -> Lora:
    """Read FILE or FILE=STRENGTH, or the folder that PEFT or diffusers wrote.

    HdbError for what is not a LoRA that hdb can add.
    """
    path, strength = parse(text)
    if path.is_dir():
        path = next((path / name for name in FILES if (path / name).is_file()), path / FILES[0])
    header = read_header(path, LARGEST)
    style = _check_kind(path, header)
    source, said = ADAPTER, header.metadata.get(ADAPTER)
    beside = path.with_name(CONFIG)
    if said is None and style == "PEFT" and beside.is_file():
        source, said = str(beside), beside.read_text(encoding="utf-8", errors="replace")
    try:
        adapter = json.loads(said or "{}")
    except (ValueError, RecursionError) as error:
        raise HdbError(f"{path} is damaged: its {source} is not JSON; get it again") from error
    adapter = adapter if isinstance(adapter, dict) else {}
    if style == "PEFT" and not adapter:
        warnings.warn(
            f"{path}: PEFT keeps alpha in {CONFIG}, which is not beside the file; alpha is taken "
            "to be the rank",
            HdbWarning,
            stacklevel=2,
        )
    for key, value in adapter.items():
        if key.endswith("init_lora_weights") and MOVES_BASE.match(str(value)):
            raise HdbError(
                f"{path} began from the base's own weights (init_lora_weights {value!r}) and "
                "belongs to a base without them; convert it to a plain LoRA with PEFT first: "
                "save_pretrained(..., path_initial_model_for_weight_conversion=...)"
            )
    few = _few_steps(path, header.metadata)
    tensors = {name: header.tensor(name) for name in header.tensors}
    return Lora(path, strength, _digest(path, header), tensors, adapter, few)


def _few_steps(path: Path, metadata: Mapping[str, str]) -> FewSteps | None:
    """Return how a base with this file is to be sampled, by the file's name, or its folder's where
    a trainer named the file, or what it says of itself."""
    own = path.absolute()
    names = [own.stem] if own.name not in FILES else [own.parent.name, *_repository(own)]
    names += [metadata.get(key, "") for key in ("modelspec.title", "ss_output_name")]
    return next((few for few in map(few_steps, names) if few), None)


def _repository(path: Path) -> list[str]:
    """Return the name of the model that a file in the hub's cache belongs to."""
    folders = [part for part in path.parts if part.startswith("models--")]
    return [folders[-1].replace("--", "/")] if folders else []


def sampling(spec: BaseSpec, loras: Sequence[Lora]) -> tuple[SampleSettings, str]:
    """Return how the base draws by default with these files, and a line that says so where a
    few-step model decides it; of several the last one does."""
    few, whose = spec.few_steps, f"base model {spec.name}"
    for lora in loras:
        if lora.few_steps and lora.strength:
            few, whose = lora.few_steps, shown(lora.path)
    if few is None:
        return spec.sampling, ""
    settings = few.of(replace(spec.sampling, guidance=spec.guidance))
    return settings, (
        f"{whose} is {few.kind}: {settings.steps} steps, guidance {settings.guidance:g}, "
        f"{settings.scheduler}, trailing; --steps, --guidance and --scheduler override"
    )


def parse(text: str) -> tuple[Path, float]:
    """Split FILE=STRENGTH; what follows the last "=" of a file's own name is not a number."""
    path, equals, number = text.rpartition("=")
    try:
        strength = float(number) if equals else 1.0
    except ValueError:
        path, strength = "", 1.0
    if not math.isfinite(strength):
        raise UsageError(
            f"strength {number!r} of {path} is not a finite number; give one such as 0.8"
        )
    return Path(os.path.expanduser(path or text)), strength


@torch.no_grad()
def stack(base: Base, loras: Sequence[Lora]) -> list[Stacked]:
    """Add files to the base's weights, one after the other; HdbError for one of another base.

    One-way: the base in memory keeps them.
    """
    if loras and base.plan.quantised:
        raise HdbError(
            f"LoRA files cannot be added to weights in {base.plan.quantised}; pass --memory normal"
        )
    layers = named_layers(base) if loras else {}
    return [_add(base, lora, layers) for lora in loras]


def parameters(stacked: Sequence[Stacked]) -> dict[str, str]:
    """Say in a picture's parameters which files were added: A1111's hashes, and strengths."""
    if not stacked:
        return {}
    hashes = ", ".join(f"{shown(each.lora.path)}: {each.lora.digest}" for each in stacked)
    loras = ", ".join(f"{shown(each.lora.path)} {each.lora.strength:g}" for each in stacked)
    return {"Lora hashes": hashes, "Loras": loras}


def named_layers(base: Base) -> dict[str, list[Layer]]:
    """Map every name that a file may give a layer to that layer.

    Names without a component may mean either text encoder; their shapes differ.
    """
    names: dict[str, list[Layer]] = {}
    for component, module in base.backbone.components.items():
        wrapped = {path for path, m in module.named_modules() if isinstance(m, LiDBLayer)}
        for path, layer in module.named_modules():
            if isinstance(layer, nn.Linear | nn.Conv2d | nn.GroupNorm | nn.LayerNorm):
                parent = path.removesuffix(".base")
                own = parent if parent in wrapped else path
                for name in set(_names(base.spec.family, component, own)):
                    names.setdefault(name, []).append(layer)
    return names


def _names(family: str, component: str, path: str) -> Iterator[str]:
    """Yield what kohya, diffusers of today and of old, PEFT, ComfyUI and OneTrainer call
    a layer."""
    shorts = SHORTS.get(component, (component,))
    dotted = [component, f"{component}.{PEFT[:-1]}", PEFT[:-1], *(f"lora_{s}" for s in shorts)]
    flat = [f"lora_{short}" for short in shorts]
    if component == "unet":
        dotted += ["diffusion_model", "model.diffusion_model"]
        flat.append("lycoris")  # LyCORIS outside of kohya's trainer
        original = original_layer(family, path)  # in which kohya trains Stable Diffusion XL
        paths = {path, attention_of_old(path)} | ({original} if original else set())
    else:
        clips = CLIPS.get(component, ())
        dotted += [f"text_encoders.{c}.transformer" for c in clips]
        dotted += [f"{c}.transformer" for c in clips] + [*clips]
        whole = canonical(component, path)
        old = re.sub(r"\.([qkv]|out)_proj$", r".to_\1", whole)
        paths = {path, whole, old, whole.removeprefix("text_model.")}
    for each in paths:
        yield each
        yield from (f"{prefix}.{each}" for prefix in dotted)
        yield from (f"{prefix}_{each.replace('.', '_')}" for prefix in flat)


def _add(base: Base, lora: Lora, layers: Mapping[str, Sequence[Layer]]) -> Stacked:
    found: dict[str, dict[str, Tensor]] = {}
    unread = []
    for key, tensor in lora.tensors.items():
        stem, part = split(key) or _saved_whole(key)
        if stem not in layers or part in found.get(stem, ()):
            unread.append(key)
        else:
            found.setdefault(stem, {})[part] = tensor
    if not found:
        raise HdbError(_of_another_base(base, lora, unread[0]))
    changed = set()
    for stem, tensors in found.items():
        changed.add(id(_change(lora, Parts(str(lora.path), stem, tensors), layers[stem])))
    return Stacked(lora, len(changed), tuple(unread))


def _saved_whole(key: str) -> tuple[str, str]:
    """Read a key of PEFT's `modules_to_save`, or of the biases that it trained, which replace
    the base's."""
    stem, _, kind = key.rpartition(".")
    return (stem.removesuffix(".base_layer") if key.startswith(PEFT) else "", f"set_{kind}")


def _of_another_base(base: Base, lora: Lora, first: str) -> str:
    other = architecture(lora.tensors) or WIDTHS.get(_context_width(lora.tensors) or 0)
    made = f"it was made for {other}" if other else "it was made for another base model"
    return (
        f"{lora.path} has no layer of base model {base.spec.name} (its first key is {first!r}); "
        f"{made}"
    )


def _context_width(tensors: Mapping[str, Tensor]) -> int | None:
    """Return the width of the text that a LoRA's cross-attention reads, None if it tells none."""
    for key, tensor in tensors.items():
        stem, part = split(key) or ("", "")
        reads = part == "down" and re.search(r"attn2[._](processor[._])?to_[kv]$", stem)
        if reads and tensor.dim():
            return tensor.shape[-1]
    return None


@torch.no_grad()
def _change(lora: Lora, parts: Parts, candidates: Sequence[Layer]) -> Layer:
    """Change the one of the layers of that name which the file's numbers fit; return it.

    HdbError if they fit none, or are not finite.
    """
    scale = partial(_scale, lora, parts)
    shape = lora_deltas.shape_of(parts)
    fitting = (x for x in candidates if shape is None or shape.numel() == x.weight.numel())
    layer = next(fitting, candidates[0])
    if not layer.weight.is_floating_point():
        raise HdbError(
            f"the base's weights are {layer.weight.dtype}, to which no LoRA can be added"
        )
    _check_sizes(lora, parts, shape, layer.weight)
    d = lora_deltas.update(parts, scale)
    for name in ("weight", "bias"):
        value = getattr(layer, name)
        now = torch.zeros(0) if value is None else value.float()
        try:
            if name == "weight":
                delta = lora_deltas.change(parts, None if d is None else d.to(now.device), now)
            else:
                delta = lora_deltas.bias_change(parts, scale, now)
            if delta is not None:
                changed = now + lora.strength * delta.to(now.device).view_as(now)
                changed = changed.to(value.dtype)  # in which a number may be too large
        except RuntimeError as error:
            raise HdbError(
                f"{lora.path} was made for another base model: {parts.layer!r} does not fit the "
                f"{name} of the layer, {tuple(now.shape)}"
            ) from error
        if delta is None:
            continue
        if not changed.isfinite().all():
            raise HdbError(
                f"{lora.path} holds numbers that are not finite in {parts.layer!r}; get it again"
            )
        value.copy_(changed)
    return layer


def _check_sizes(lora: Lora, parts: Parts, shape: torch.Size | None, weight: Tensor) -> None:
    """Raise HdbError where a change is of another size than the weight."""
    if shape and (shape.numel() != weight.numel() or shape[0] != len(weight)):
        raise HdbError(
            f"{lora.path} was made for another base model: {parts.layer!r} changes {shape[0]} x "
            f"{shape[1:].numel()} numbers, the layer has {len(weight)} x {weight[0].numel()}"
        )


def _scale(lora: Lora, parts: Parts, rank: int | None) -> float:
    """Return alpha / r of a layer: from its own tensor, or what diffusers or PEFT say beside the
    tensors, else 1."""
    stem = parts.layer
    component, _, path = stem.partition(".")
    if component not in SHORTS:
        component, path = "", stem.removeprefix(PEFT)

    def said(*names: str) -> Any:
        places = [lora.adapter.get(f"{p}{n}") for n in names for p in (f"{component}.", "")]
        return next((value for value in places if value is not None), None)

    try:
        if rank is None:  # LoKr of two whole factors: LyCORIS has no scale there, PEFT has
            own = _of_pattern(said("rank_pattern"), path, stem)
            rank = said("r") if own is None else own
            if rank is None:
                return 1.0
        if "alpha" in parts:
            return float(parts.tensors["alpha"]) / rank
        own = _of_pattern(said("alpha_pattern"), path, stem)
        alpha = said("lora_alpha", "alpha") if own is None else own
        alpha = rank if alpha is None else alpha
        return float(alpha) / (math.sqrt(rank) if said("use_rslora") else rank)
    except (TypeError, ValueError, RuntimeError, ArithmeticError) as error:
        raise HdbError(f"{lora.path} is damaged: alpha of {stem!r} is not a number") from error


def _of_pattern(patterns: Any, path: str, stem: str) -> Any:
    """Return what PEFT finds for a layer: the value of the first key that is, as a regular
    expression, its path or the end of its path after a dot. None if none is.

    HdbError for an expression that is none, or that takes too long.
    """
    for pattern, value in dict(patterns or {}).items():
        try:
            if regex.match(rf"(.*\.)?({pattern})$", path, timeout=SECONDS):
                return value
        except (regex.error, TimeoutError, MemoryError, RecursionError) as error:
            reason = str(error) or "it takes too long"
            raise HdbError(
                f"the pattern {pattern[:60]!r} for {stem!r} is not a usable regular "
                f"expression: {reason}; get the LoRA again"
            ) from error
    return None


def _check_kind(path: Path, header: Header) -> str:
    """Return whose keys a file has; HdbError for an identity, for what is not a LoRA, and for those
    that hdb cannot add."""
    if "hdb.kind" in header.metadata:
        raise HdbError(f"{path} is hdb's own, no LoRA; add identities up with hdb compose")
    other = other_adapter(header.tensors)
    if other:
        raise HdbError(
            f"{path} is {other[0]} (by its tensor {other[1]!r}), which hdb cannot add; give a "
            "LoRA, LoCon, LoHa, LoKr or DoRA, or full differences"
        )
    style = lora_style(header.tensors)
    if style is None:
        first = next(map(repr, header.tensors), "none")
        raise HdbError(
            f"{path} is not a LoRA with kohya, diffusers, PEFT or ComfyUI keys (its first tensor: "
            f"{first}); give one"
        )
    return style


def _digest(path: Path, header: Header) -> str:
    """Return A1111's hash: what kohya wrote, else sha256 of all that follows the header."""
    said = header.metadata.get("sshs_model_hash", "")
    return (said if SHA256.fullmatch(said) else sha256_of(path, header.start))[:12]
