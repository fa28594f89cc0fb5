"""Put LiDB layers into a base model and take them out again, leaving it bitwise as it was."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor, nn

from hdbcli.method import basis
from hdbcli.method.lidb import Factors, LiDBLayer, TargetLayer, Theta, lidb_layer, reach, shape_of
from registry.errors import HdbError

# (component, module path) -> the path under which a target is known for good. A target's name
# decides its basis, so it may not change with the library that builds the model.
Canonical: TypeAlias = Callable[[str, str], str]


def as_it_is(component: str, path: str) -> str:
    """Name a module by its path: right for models whose paths never change."""
    return path


@dataclass(frozen=True)
class Injected:
    """A base model's LiDB layers by canonical target name, in the spec's order."""

    layers: Mapping[str, LiDBLayer]
    a: int
    b: int
    seed: int
    digest: str | None = None  # of the weights as they are stored, where they were rounded since

    def factors(self, theta: Theta) -> Factors:
        """Multiply theta by every target's basis."""
        if theta.down.shape[1] != len(self.layers):
            raise HdbError(
                f"the identity has {theta.down.shape[1]} targets, the base {len(self.layers)}; "
                "it was made for another base model"
            )
        pairs = [
            layer.factors(theta.down[:, i], theta.up[:, i])
            for i, layer in enumerate(self.layers.values())
        ]
        return Factors(tuple(down for down, _ in pairs), tuple(up for _, up in pairs))

    @contextmanager
    def adapted(self, adapter: Theta | Factors | None) -> Iterator[None]:
        """Give every target its residual inside the block: of a batch of identities, of one for all
        samples, or none."""
        factors = self.factors(adapter) if isinstance(adapter, Theta) else adapter
        none = [None] * len(self.layers)
        pairs = none if factors is None else zip(factors.down, factors.up, strict=True)
        try:
            for layer, pair in zip(self.layers.values(), pairs, strict=True):
                layer.residual = pair
            yield
        finally:
            for layer in self.layers.values():
                layer.residual = None

    @property
    def shapes(self) -> dict[str, tuple[int, int]]:
        """Map each target to the (n, m) of its weight."""
        return {name: layer.shape for name, layer in self.layers.items()}

    def fingerprint(self) -> basis.Fingerprint:
        return basis.fingerprint(self.seed, self.shapes, self.a, self.b)

    def targets_digest(self) -> str:
        """Hash the ordered target names: their order is the order of theta and of
        hypernetwork tokens."""
        return digest_names(self.layers)

    def weights_digest(self) -> str:
        """Hash the targeted weights as float16, so that fp32 and fp16 copies of one base agree."""
        return self.digest or digest_weights(
            layer.base.weight.detach() for layer in self.layers.values()
        )


def digest_names(names: Iterable[str]) -> str:
    return hashlib.sha256("\n".join(names).encode()).hexdigest()


def digest_weights(weights: Iterable[Tensor]) -> str:
    digest = hashlib.sha256()
    for weight in weights:
        digest.update(weight.to("cpu", torch.float16).contiguous().numpy().tobytes())
    return digest.hexdigest()


def inject(
    components: Mapping[str, nn.Module],
    targets: Mapping[str, tuple[str, ...]],
    a: int,
    b: int,
    seed: int,
    canonical: Canonical = as_it_is,
) -> Injected:
    """Replace every target of the components by a LiDB layer and freeze all their parameters."""
    layers = {}
    for component, path, base in find_targets(components, targets, canonical):
        name = f"{component}.{canonical(component, path)}"
        n, m = shape_of(base)
        down = basis.down_basis(seed, name, a, m).to(base.weight.device)
        up = basis.up_basis(seed, name, b, n).to(base.weight.device)
        layers[name] = lidb_layer(base, down, up)
        _set(components[component], path, layers[name])
    for module in components.values():
        module.requires_grad_(False)
    return Injected(layers, a, b, seed)


def eject(components: Mapping[str, nn.Module]) -> None:
    """Put the base's own layers back."""
    for module in components.values():
        for path, layer in list(module.named_modules()):
            if isinstance(layer, LiDBLayer):
                _set(module, path, layer.base)


def find_targets(
    components: Mapping[str, nn.Module],
    targets: Mapping[str, tuple[str, ...]],
    canonical: Canonical = as_it_is,
) -> list[tuple[str, str, TargetLayer]]:
    """List (component, module path, layer) of all targets, in the order of theta."""
    for component in targets:
        if component not in components:
            raise HdbError(
                f"the base model has no component {component!r} (it has {', '.join(components)}); "
                "its spec names targets there"
            )
    layers = layers_in(components, canonical)
    found = in_order(layers, targets)
    if not found:
        raise HdbError("no layer of the base model matches its spec's targets; check the patterns")
    for name in found:
        _check_kind(name, layers[name][2])
    return [layers[name] for name in found]


def layers_in(
    components: Mapping[str, nn.Module], canonical: Canonical = as_it_is
) -> dict[str, tuple[str, str, TargetLayer]]:
    """Map the canonical name of every layer that could be a target to (component, path, layer)."""
    return {
        f"{component}.{canonical(component, path)}": (component, path, layer)
        for component, module in components.items()
        for path, layer in module.named_modules()
        if isinstance(layer, nn.Linear | nn.Conv2d)
    }


def _check_kind(name: str, layer: TargetLayer) -> None:
    """Raise HdbError for a convolution whose dW is not an n x m matrix, or that pads in
    another way."""
    if isinstance(layer, nn.Linear):
        return
    plain = layer.groups == 1 and layer.padding_mode == "zeros"
    within = not isinstance(layer.padding, str) and all(
        map(int.__le__, layer.padding, reach(layer))
    )
    if not plain or not within:
        raise HdbError(
            f"target {name} is a convolution of {layer.groups} groups, padded {layer.padding} "
            f"({layer.padding_mode}); a target needs 1 group and zeros within its kernel's reach, "
            "so leave it out of the base's targets"
        )


def matches(name: str, targets: Mapping[str, tuple[str, ...]]) -> bool:
    """Say whether a spec's patterns make the layer of this canonical name a target."""
    component, _, path = name.partition(".")
    return any(re.fullmatch(pattern, path) for pattern in targets.get(component, ()))


def in_order(names: Iterable[str], targets: Mapping[str, tuple[str, ...]]) -> list[str]:
    """Pick the targets out of canonical names and sort them as theta has them: by component, then
    by name, numbers as numbers.

    Not in the order of modules, which depends on the library that builds the model; and the names
    in a file's header are enough.
    """
    components = list(targets)

    def key(name: str) -> tuple[int, list[tuple[int, str]]]:
        component, _, path = name.partition(".")
        parts = [(int(p), "") if p.isdigit() else (-1, p) for p in path.split(".")]
        return components.index(component), parts

    return sorted((name for name in names if matches(name, targets)), key=key)


def _set(root: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(root.get_submodule(parent), name, module)
