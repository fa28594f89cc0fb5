"""A base model as files: where each target's weight lies, read without loading the model.

A diffusers folder or one original ("LDM") checkpoint. Only headers are read; a tensor is read when
it is asked for, so that memory stays small whatever the size of the model.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor

from hdbcli.method.basis import Fingerprint, fingerprint
from hdbcli.method.inject import digest_names, digest_weights, in_order
from registry.checkpoints.contents import WEIGHTS, weight_files
from registry.checkpoints.ldm import canonical, layers_of, layout_of, original_names
from registry.checkpoints.safetensors import LARGEST, Header, TensorInfo, read_header
from registry.errors import HdbError
from registry.spec import BaseSpec

MERGED = ("F32", "F16", "BF16")  # dtypes of weights that an identity can be added to
MATRICES = (2, 4)  # dimensions of the weight of a linear layer, of a convolution
STEMS = tuple(dict.fromkeys(WEIGHTS.values()))


@dataclass(frozen=True)
class Place:
    """The rows `first` to `first + n` of tensor `key` in `file` are a target's weight, (n, m) as
    a matrix."""

    file: Path
    key: str
    first: int
    shape: tuple[int, int]


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """A base model's files, by component (one file of all has the component ""), and
    its targets."""

    spec: BaseSpec
    root: Path
    files: Mapping[str, tuple[Path, ...]]
    headers: Mapping[Path, Header]
    places: Mapping[str, Place]  # by canonical name, in the order of theta

    @property
    def single(self) -> bool:
        return self.root.is_file()

    @property
    def shapes(self) -> dict[str, tuple[int, int]]:
        return {name: place.shape for name, place in self.places.items()}

    def targets_digest(self) -> str:
        return digest_names(self.places)

    def weights_digest(self) -> str:
        """Hash the targeted weights, each read in turn."""
        return digest_weights(self._weights())

    def fingerprint(self) -> Fingerprint:
        return fingerprint(self.spec.basis_seed, self.shapes, self.spec.a, self.spec.b)

    def info(self, place: Place) -> TensorInfo:
        return self.headers[place.file].tensors[place.key]

    def _weights(self) -> Iterator[Tensor]:
        for place in self.places.values():
            whole = self.headers[place.file].tensor(place.key)
            yield whole[place.first : place.first + place.shape[0]]


def made_with(spec: BaseSpec, layers: Iterable[str], targets_digest: str | None) -> BaseSpec:
    """Return a spec with the target set of that digest, the one that an identity was made with.

    `layers` are the canonical names of all that could be targets. The spec is returned as it is
    where none of its sets has the digest, and where nothing is asked for.
    """
    layers = tuple(layers)
    for targets in spec.target_sets.values():
        if targets_digest and digest_names(in_order(layers, targets)) == targets_digest:
            return replace(spec, targets=targets)
    return spec


def open_checkpoint(spec: BaseSpec, targets_digest: str | None = None) -> Checkpoint:
    """Read the headers of a base's files and find its targets, those of that digest if there are
    several sets; HdbError if some are missing."""
    spec.check()
    root = spec.files
    if root is None:
        raise HdbError(f"base model {spec.name} names no files to copy; ask who made its plug-in")
    files: dict[str, tuple[Path, ...]]
    if root.is_file():
        files = {"": (root,)}
    elif root.is_dir():
        files = {part.name: _component_files(part) for part in sorted(root.iterdir())}
    else:
        raise HdbError(f"{root} of base model {spec.name} is gone; hdb base verify {spec.name}")
    every = [file for group in files.values() for file in group]
    headers = {file: read_header(file, LARGEST) for file in every}
    found = dict(_places(spec.family, root, files, headers))
    spec = made_with(spec, found, targets_digest)
    names = in_order(found, spec.targets)
    for component in spec.targets:
        if not any(name.startswith(f"{component}.") for name in names):
            raise HdbError(
                f"{root} holds no safetensors weights of the {component} of base model "
                f"{spec.name}; is it half a download, or another model?"
            )
    places = {name: found[name] for name in names}
    for name, place in places.items():
        dtype = headers[place.file].tensors[place.key].dtype
        if dtype not in MERGED:
            raise HdbError(f"{name} is stored as {dtype}; only {', '.join(MERGED)} can be merged")
    return Checkpoint(spec, root, files, headers, places)


def _component_files(folder: Path) -> tuple[Path, ...]:
    """Return the weights that diffusers would load: one file, or the shards of an index."""
    stem = next((stem for stem in STEMS if any(folder.glob(f"{stem}*.safetensors*"))), None)
    return tuple(weight_files(folder, stem)) if stem else ()


def _places(
    family: str,
    root: Path,
    files: Mapping[str, tuple[Path, ...]],
    headers: Mapping[Path, Header],
) -> Iterator[tuple[str, Place]]:
    """Yield every layer that could be a target with its place, in the order of the files."""
    if root.is_file():
        layout, names = layout_of(family), original_names(headers[root].tensors)
        for key, info in headers[root].tensors.items():
            for layer in layers_of(names[key], layout):
                name = f"{layer.component}.{canonical(layer.component, layer.path)}"
                if len(info.shape) in MATRICES:
                    n = info.shape[0] // layer.parts
                    shape = (n, math.prod(info.shape[1:]))
                    yield name, Place(root, key, layer.part * n, shape)
        return
    for component, group in files.items():
        for file in group:
            for key, info in headers[file].tensors.items():
                name = f"{component}.{canonical(component, key.removesuffix('.weight'))}"
                if key.endswith(".weight") and len(info.shape) in MATRICES:
                    shape = (info.shape[0], math.prod(info.shape[1:]))
                    yield name, Place(file, key, 0, shape)
