"""Models of true size with random weights: they prove everything but the look of the pictures."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from pathlib import Path

import torch
from torch import nn

from hdbcli.method.inject import find_targets
from hdbcli.method.lidb import shape_of
from registry.checkpoints.ldm import canonical, layout_of, rename
from registry.checkpoints.safetensors import Item, write_tensors
from registry.stable_diffusion.families import FAMILIES, Family
from registry.stable_diffusion.loading import empty_network

SIZE = 0.02  # standard deviation of the weights


def empty_networks(family: Family) -> dict[str, nn.Module]:
    """Build a family's networks at true size without memory for their weights."""
    parts = ("unet", "vae", *family.layers)
    return {part: empty_network(part, family.configs()) for part in parts}


def target_shapes(family: Family) -> dict[str, tuple[int, int]]:
    """Map each of a family's targets to the (n, m) of its weight."""
    found = find_targets(empty_networks(family), family.targets, canonical)
    return {f"{c}.{path}": shape_of(layer) for c, path, layer in found}


def write_random(name: str, path: Path) -> None:
    """Write an original single file of a family (sd1, sd2, sdxl), as float16."""
    layout = layout_of(name)
    shapes: dict[str, tuple[int, ...]] = {}
    for component, network in empty_networks(FAMILIES[name]).items():
        for key, value in network.state_dict().items():
            place = rename(component, canonical(component, key), layout)
            if place is None:
                continue
            shape = tuple(value.shape)
            if place.parts > 1:
                shape = (place.parts * shape[0], *shape[1:])
            shapes[place.key] = (*shape, 1, 1)[:4] if place.conv else shape
    items = [Item(key, "F16", shape, partial(_random, shape)) for key, shape in shapes.items()]
    write_tensors(path, items, {"format": "pt"}, lambda _: None)


def _random(shape: tuple[int, ...]) -> Iterable[bytes]:
    values = torch.randn(shape) * SIZE
    if len(shape) == 1:
        values += 1  # norms let their input through
    yield values.half().numpy().tobytes()
