"""The bank: optimised LiDBs of many people, which supervise the hypernetwork.

HyperDreamBooth §3.3. All people start from the same theta_0 and are optimised side by side
with others through the per-sample layer. A folder of safetensors shards with an index: a run that
was cut off goes on after the last shard.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from hdbcli.config import BankConfig, Tell
from hdbcli.method.lidb import Theta
from hdbcli.model.base import Base
from hdbcli.model.memory import Work
from hdbcli.training.people import People
from hdbcli.training.refine import refine
from registry.checkpoints.safetensors import read_tensors, save_tensors
from registry.errors import HdbError
from registry.files import write_beside
from registry.spec import BaseSpec

INDEX = "index.json"
FORMAT = 1


@dataclass(frozen=True)
class Shard:
    """What one shard added to the bank, and the mean loss of its people before and after."""

    people: int
    total: int  # of those asked for, who are in the bank by now; it may know others
    loss_start: float
    loss_end: float


def work_of(spec: BaseSpec, at_once: int) -> Work:
    """Say what a bank asks of a base: a step takes all people of a shard, so that no plan can part
    them, and nothing rounded, since hypernetworks learn from it."""
    samples = at_once * spec.batch
    return Work(samples, spec.resolution, trains=True, exact=True, least=at_once)


def build_bank(
    base: Base, people: People, folder: Path, config: BankConfig, tell: Tell
) -> Iterator[Shard]:
    """Optimise the people who are not in the bank yet, a shard of `config.at_once` people at
    a time."""
    index = _open_index(folder, _settings(base, config))
    done = {name for shard in index["shards"] for name in shard["names"]}
    assert people.latents is not None
    left = [i for i, name in enumerate(people.names) if name not in done]
    for start in range(0, len(left), config.at_once):
        chosen = left[start : start + config.at_once]
        latents = []
        for person in chosen:
            plain = people.latents[list(people.members[person])][:, 0]
            latents.append(torch.from_numpy(plain).float().to(base.device))
        theta = base.first_theta(config.rank, len(chosen))
        result = refine(base, theta, latents, config.refine(), tell)
        name = f"theta-{len(index['shards']):05d}.safetensors"
        tensors = {"down": result.theta.down, "up": result.theta.up}
        index["shards"].append({"file": name, "names": [people.names[i] for i in chosen]})
        with write_beside(folder / name) as beside:
            save_tensors({k: v.cpu().contiguous() for k, v in tensors.items()}, beside)
        with write_beside(folder / INDEX) as beside:  # last: it never names what is not there
            beside.write_text(json.dumps(index, indent=1))
        total = len(people.names) - len(left) + start + len(chosen)
        means = float(result.loss_start.mean()), float(result.loss_end.mean())
        yield Shard(len(chosen), total, *means)


def read_bank(folder: Path, base: Base) -> dict[str, Theta]:
    """Read the theta of all people by name; HdbError if the bank is another base's or damaged."""
    path = folder / INDEX
    if not path.exists():
        raise HdbError(f"{folder} holds no bank ({INDEX} is missing); make one: hdb train bank")
    index = _read_index(path)
    wanted = _settings(base, BankConfig())["base"]
    if index["settings"]["base"] != wanted:
        raise HdbError(
            f"the bank in {folder} was made for {index['settings']['base']}, this base is {wanted}"
        )
    found: dict[str, Theta] = {}
    for shard in index["shards"]:
        try:
            _, tensors = read_tensors(folder / shard["file"])
            down, up = tensors["down"], tensors["up"]
        except (HdbError, KeyError) as error:
            raise HdbError(f"{folder / shard['file']} is missing or damaged ({error})") from error
        for i, name in enumerate(shard["names"]):
            found[name] = Theta(down[i : i + 1], up[i : i + 1])
    return found


def _settings(base: Base, config: BankConfig) -> dict[str, Any]:
    identity = {
        "name": base.spec.name,
        "targets": base.injected.targets_digest(),
        "weights": base.injected.weights_digest(),
        "basis": base.injected.fingerprint().digest,
    }
    return {"base": identity, "config": asdict(config)}


def _open_index(folder: Path, settings: dict[str, Any]) -> dict[str, Any]:
    path = folder / INDEX
    if not path.exists():
        return {"format": FORMAT, "settings": settings, "shards": []}
    index = _read_index(path)
    if index["settings"] != settings:
        raise HdbError(
            f"the bank in {folder} was begun with {index['settings']}, not {settings}; "
            "go on with those, or give another folder"
        )
    return index


def _read_index(path: Path) -> dict[str, Any]:
    try:
        index = json.loads(path.read_text())
        if index["format"] != FORMAT:
            raise ValueError(f"format {index['format']}, this hdb reads {FORMAT}")
        index["settings"]["base"], index["shards"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise HdbError(f"{path} is not a bank index ({error}); restore or delete it") from error
    return index
