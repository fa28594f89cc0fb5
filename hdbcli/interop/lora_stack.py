"""Stack LoRA files of other tools on a base's weights: styles and few-step models, under whoever
is worn.

dW = strength x alpha / r x up @ down is added to linear and convolutional layers; LiDB layers add
their residual beside it. Keys are kohya's, with the original network's names too, or diffusers'.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, load_file
from torch import Tensor, nn

from hdbcli.errors import HdbError
from hdbcli.interop.lora_readers import COMFY
from hdbcli.method.lidb import LiDBLayer, TargetLayer
from hdbcli.model.base import Base
from registry.checkpoints.ldm import original_layer
from registry.checkpoints.lora_formats import lora_style
from registry.checkpoints.safetensors import SHA256, Header, read_header
from registry.checkpoints.tensors import canonical
from registry.store import shown

LARGEST = 2**34  # bytes of a file; a LoRA of Stable Diffusion XL has up to 2e9
SHORTS = {"unet": ("unet",), "text_encoder": ("te", "te1"), "text_encoder_2": ("te2",)}
# What follows the name of a layer -> which part it is; diffusers' of old and PEFT's own too.
PARTS = COMFY | {".lora.down.weight": "down", ".lora.up.weight": "up"}
PARTS |= {".lora_linear_layer.down.weight": "down", ".lora_linear_layer.up.weight": "up"}
PARTS |= {".lora_A.default.weight": "down", ".lora_B.default.weight": "up"}
NOT_PLAIN = re.compile(r"\.(hada_|lokr_|oft_|dora_scale|lora_mid|lora_magnitude)")
ADAPTER = "lora_adapter_metadata"  # where diffusers keeps the alpha that its keys do not have


@dataclass(frozen=True, eq=False)
class Lora:
    """One file: tensors by key, what it says of its alpha, and how strongly it is added."""

    path: Path
    strength: float
    digest: str  # twelve hex digits, as A1111 writes them
    tensors: Mapping[str, Tensor]
    adapter: Mapping[str, Any]


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
        known = {"name": shown(lora.path), "path": str(lora.path), "strength": lora.strength}
        return {**known, "hash": lora.digest, "layers": self.layers, "unread": len(self.unread)}


def read(text: str) -> Lora:
    """Read FILE or FILE=STRENGTH; HdbError for what is no plain LoRA."""
    path, strength = parse(text)
    header = read_header(path, LARGEST)
    _check_kind(path, header)
    try:
        adapter = json.loads(header.metadata.get(ADAPTER) or "{}")
    except (ValueError, RecursionError) as error:
        raise HdbError(f"{path} is damaged: its {ADAPTER} is no JSON; get it again") from error
    adapter = adapter if isinstance(adapter, dict) else {}
    return Lora(path, strength, _digest(path, header), _load(path), adapter)


def _load(path: Path) -> dict[str, Tensor]:
    try:
        str(path).encode()
    except UnicodeEncodeError:  # safetensors opens no such path itself
        return load(path.read_bytes())
    return load_file(path)


def parse(text: str) -> tuple[Path, float]:
    """Split FILE=STRENGTH; what follows the last "=" of a file's own name is no number."""
    path, equals, number = text.rpartition("=")
    try:
        strength = float(number) if equals else 1.0
    except ValueError:
        path, strength = "", 1.0
    if not math.isfinite(strength):
        raise HdbError(f"strength {number!r} of {path} is no finite number; give one such as 0.8")
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


def named_layers(base: Base) -> dict[str, TargetLayer]:
    """Map every name that a file may give a layer to that layer."""
    names: dict[str, TargetLayer] = {}
    for component, module in base.backbone.components.items():
        wrapped = {path for path, m in module.named_modules() if isinstance(m, LiDBLayer)}
        for path, layer in module.named_modules():
            if isinstance(layer, nn.Linear | nn.Conv2d):
                parent = path.removesuffix(".base")
                own = parent if parent in wrapped else path
                names |= dict.fromkeys(_names(base.spec.family, component, own), layer)
    return names


def _names(family: str, component: str, path: str) -> Iterator[str]:
    """Yield what kohya, diffusers and diffusers of old call a layer."""
    whole = canonical(component, path)
    yield f"{component}.{whole}"
    yield f"{component}.{path}"
    for short in SHORTS.get(component, (component,)):
        yield f"lora_{short}_{whole.replace('.', '_')}"
    if component == "unet":
        old = re.sub(r"\.to_out\.0$", ".to_out", path).replace(".to_", ".processor.to_")
        yield f"unet.{old}"
        yield old
        original = original_layer(family, path)
        if original:  # kohya trains Stable Diffusion XL in the original code
            yield f"lora_unet_{original.replace('.', '_')}"


def _add(base: Base, lora: Lora, layers: Mapping[str, TargetLayer]) -> Stacked:
    found: dict[str, dict[str, Tensor]] = {}
    unread = []
    for key, tensor in lora.tensors.items():
        suffix = next((end for end in PARTS if key.endswith(end)), None)
        stem = key.removesuffix(suffix or "")
        if suffix and stem in layers:
            found.setdefault(stem, {})[PARTS[suffix]] = tensor
        else:
            unread.append(key)
    if not found:
        raise HdbError(
            f"{lora.path} has no layer of base model {base.spec.name} (its first key is "
            f"{unread[0]!r}); it was made for another base model"
        )
    for stem, parts in found.items():
        weight = layers[stem].weight
        if not weight.is_floating_point():
            raise HdbError(f"the base's weights are {weight.dtype}, to which no LoRA can be added")
        delta = _delta(lora, stem, parts, weight)
        weight.copy_(weight.float() + delta)
    return Stacked(lora, len({id(layers[stem]) for stem in found}), tuple(unread))


def _delta(lora: Lora, stem: str, parts: Mapping[str, Tensor], weight: Tensor) -> Tensor:
    """Return what one layer gets, in float32 and of its shape; HdbError where that cannot be."""
    none = torch.zeros(0)
    lacking = [p for p in ("down", "up") if (t := parts.get(p, none)).dim() < 2 or not t.numel()]
    if lacking:
        raise HdbError(f"{lora.path} is damaged: {stem!r} has no {lacking[0]} matrix; get it again")
    down, up = (parts[part].to(weight.device).float().flatten(1) for part in ("down", "up"))
    inputs, rank = weight[0].numel(), len(down)
    if up.shape != (len(weight), rank) or down.shape[1] != inputs:
        raise HdbError(
            f"{lora.path} was made for another base model: {stem!r} changes {len(up)} x "
            f"{down.shape[1]} numbers, the layer has {len(weight)} x {inputs}"
        )
    delta = lora.strength * _scale(lora, stem, parts.get("alpha"), rank) * (up @ down)
    if not delta.isfinite().all():
        raise HdbError(f"{lora.path} holds numbers that are not finite in {stem!r}; get it again")
    return delta.view_as(weight)


def _scale(lora: Lora, stem: str, alpha: Tensor | None, rank: int) -> float:
    """Return alpha / r of a layer: from its own tensor, or what diffusers says beside the tensors,
    else 1."""
    component, _, path = stem.partition(".")
    try:
        if alpha is not None:
            return float(alpha) / rank
        said = lora.adapter.get(f"{component}.lora_alpha", rank)
        for name, own in dict(lora.adapter.get(f"{component}.alpha_pattern") or {}).items():
            if f".{path}".endswith(f".{name}"):  # literally: a regex could hang
                said = own
        root = bool(lora.adapter.get(f"{component}.use_rslora"))
        return float(said) / (math.sqrt(rank) if root else rank)
    except (TypeError, ValueError, RuntimeError) as error:
        raise HdbError(f"{lora.path} is damaged: alpha of {stem!r} is no number") from error


def _check_kind(path: Path, header: Header) -> None:
    """Raise HdbError for an identity, for what is no LoRA, and for those that are not up @ down."""
    if "hdb.kind" in header.metadata:
        raise HdbError(f"{path} is hdb's own, no LoRA; add identities up with hdb compose")
    if lora_style(header.tensors) is None:
        first = next(map(repr, header.tensors), "none")
        raise HdbError(
            f"{path} is no LoRA with kohya or diffusers keys (its first tensor: {first}); give one"
        )
    other = [key for key in header.tensors if NOT_PLAIN.search(key)]
    if other:
        raise HdbError(
            f"{path} is no plain LoRA: {len(other)} of its tensors, such as {other[0]!r}, are of "
            "LoHa, LoKr, DoRA or the like; give a plain one"
        )


def _digest(path: Path, header: Header) -> str:
    """Return A1111's hash: what kohya wrote, else sha256 of all that follows the header."""
    said = header.metadata.get("sshs_model_hash", "")
    if SHA256.fullmatch(said):
        return said[:12]
    digest = hashlib.sha256()
    with path.open("rb") as file:
        file.seek(header.start)
        while chunk := file.read(2**22):
            digest.update(chunk)
    return digest.hexdigest()[:12]
