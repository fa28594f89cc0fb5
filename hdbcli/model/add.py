"""Add a base model: recognise it, load it once, and keep what ties identities to its weights."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from torch import nn

from hdbcli.config import Tell
from hdbcli.method.inject import digest_weights, find_targets
from registry.bases.added import load, mark, spec_of
from registry.bases.settings import Added, Mark, Settings, write_settings
from registry.checkpoints.contents import Checkpoint, read_checkpoint
from registry.checkpoints.ldm import canonical
from registry.errors import HdbError
from registry.stable_diffusion.recognise import prediction_of, recognise, resolution_of


def adopt(name: str, path: Path, origin: str, prediction: str | None, tell: Tell) -> Added:
    """Keep a checkpoint as the base model `name`; HdbError, with nothing kept, if
    hdb could not work on it."""
    checkpoint = read_checkpoint(path)
    family = recognise(checkpoint)
    predicted = prediction_of(checkpoint, family, prediction)
    configs = family.configs(predicted) if checkpoint.single else path
    added = Added(
        name=name,
        path=str(path),
        family=family.name,
        prediction=predicted,
        resolution=resolution_of(configs),
        digest="",
        files={},
        origin=origin,
    )
    tell("load", 0, 1)
    # float16 is what the digest is of, and half of the memory.
    backbone = load(added, "cpu", "float16")
    components = backbone.components
    targets = find_targets(components, spec_of(added).targets, canonical)
    if len(targets) != family.count:
        raise HdbError(
            f"{path} has {len(targets)} targets, {family.title} has {family.count}; update hdb"
        )
    _check_finite(path, {**components, "vae": backbone.autoencoder})
    digest = digest_weights(linear.weight.detach() for _, _, linear in targets)
    added = replace(added, digest=digest, files=_marks(checkpoint, tell))
    write_settings(name, Settings(added=added))
    return added


def _marks(checkpoint: Checkpoint, tell: Tell) -> dict[str, Mark]:
    """Read every file whole, so that a change will be seen."""
    folder = checkpoint.path.parent if checkpoint.single else checkpoint.path
    marks = {}
    for done, file in enumerate(checkpoint.files):
        tell("hash", done, len(checkpoint.files))
        marks[os.path.relpath(file, folder)] = mark(file)
    return marks


def _check_finite(path: Path, components: Mapping[str, nn.Module]) -> None:
    """Raise HdbError for weights that are NaN, infinite, or too large for float16."""
    for component, module in components.items():
        for name, weight in module.named_parameters():
            if not weight.isfinite().all():
                raise HdbError(
                    f"{path} holds numbers that are not finite in {component}.{name}, so it could "
                    "draw nothing; download it again, or give another model"
                )
