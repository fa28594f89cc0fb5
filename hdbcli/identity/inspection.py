"""Look inside an identity: energy and singular values of every target, summed by component
and kind.

Energy is the squared Frobenius norm of dW. The basis is orthonormal, so that of the core is the
same, and no base model is needed for the numbers, only for the targets' names.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from hdbcli.identity.file import Identity
from hdbcli.method.algebra import decompose

# What a target does, by a part of its name; the first that fits. The rest is "other".
KINDS = {
    "self-attention": (".attn1.", ".self_attn."),
    "cross-attention": (".attn2.",),
    "feed-forward": (".ff.", ".mlp."),
    "convolution": (".conv",),  # of residual blocks and samplers
    "projection": (".proj_in", ".proj_out"),  # around attention: linear, or a convolution of 1 x 1
}


@dataclass(frozen=True)
class TargetEnergy:
    """One target: the singular values of dW, falling; energy is the sum of their squares."""

    name: str
    component: str
    kind: str
    numbers: int
    energy: float
    singular: tuple[float, ...]


@dataclass(frozen=True)
class Inspection:
    """What an identity holds. `verified`: its basis digest is the base's; None without a base."""

    targets: tuple[TargetEnergy, ...]
    energy: float
    verified: bool | None
    problem: str | None

    def share(self, field: str) -> dict[str, float]:
        """Return how the energy is divided by `component` or `kind`, as shares of 1."""
        shares: dict[str, float] = {}
        for target in self.targets:
            key = getattr(target, field)
            shares[key] = shares.get(key, 0.0) + target.energy / max(self.energy, 1e-30)
        return shares


def inspect(
    identity: Identity, names: Sequence[str] | None, verified: bool | None, problem: str | None
) -> Inspection:
    """Decompose every target; `names` (L) are the base's, None where it is not there."""
    _, singular, _ = decompose(identity.theta)
    per_target = identity.numbers // len(identity.down)
    targets = []
    for i, values in enumerate(singular[0].tolist()):
        name = names[i] if names else f"target {i}"
        component = name.split(".", 1)[0] if names else "?"
        energy = sum(value**2 for value in values)
        targets.append(
            TargetEnergy(name, component, kind_of(name), per_target, energy, tuple(values))
        )
    return Inspection(tuple(targets), sum(t.energy for t in targets), verified, problem)


def kind_of(name: str) -> str:
    """Say what a target does, by its name."""
    for kind, parts in KINDS.items():
        if any(part in name for part in parts):
            return kind
    return "other"


def block_of(name: str) -> str:
    """Name the block that a target is in, short enough for an axis: `down 0`, `mid`, `layer 3`."""
    match = re.search(r"\.(down|up|mid)_blocks?(?:\.(\d+))?|\.(layer)s\.(\d+)", name)
    return " ".join(part for part in match.groups() if part) if match else ""


def draw(inspection: Inspection, path: Path) -> None:
    """Write a PNG: a bar for each target in the order of depth, as high as its energy, a colour
    for each kind; ranks are stacked, the strongest below."""
    from matplotlib.figure import Figure

    components = list(dict.fromkeys(target.component for target in inspection.targets))
    sheet = Figure(figsize=(12, 3.2 * len(components)), dpi=100, layout="constrained")
    parts = sheet.subplots(len(components), 1, squeeze=False)[:, 0]
    colours = {kind: f"C{i}" for i, kind in enumerate((*KINDS, "other"))}
    for part, component in zip(parts, components, strict=True):
        targets = [t for t in inspection.targets if t.component == component]
        bottom = np.zeros(len(targets))
        for k in range(len(targets[0].singular)):
            height = np.array([t.singular[k] ** 2 for t in targets])
            tints = [colours[t.kind] for t in targets]
            part.bar(
                range(len(targets)), height, bottom=bottom, color=tints, alpha=1 / (1 + k) ** 0.5
            )
            bottom += height
        for kind in dict.fromkeys(t.kind for t in targets):
            part.bar([0], [0], color=colours[kind], label=kind)
        blocks = [block_of(t.name) for t in targets]
        starts = [i for i, block in enumerate(blocks) if block not in ("", *blocks[i - 1 : i])]
        part.set_xticks(starts, [blocks[i] for i in starts], ha="left")
        part.set(title=component, xlabel="target, by depth", ylabel="energy of dW")
        part.legend()
    sheet.savefig(path, format="png")
