"""Benchmarks: what hdb promises, each measured against the plain alternative in the same run."""

from __future__ import annotations

import statistics
import subprocess
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import TypeAlias

import torch

from hdbcli.bench.harness import ROUNDS, Row, hdb, measured, paired, random_identity, scratch, timed
from hdbcli.bench.random_model import target_shapes, write_random
from hdbcli.compare.timing import step_seconds
from hdbcli.config import PORTRAIT, BankConfig, Tell
from hdbcli.method.basis import down_basis, up_basis
from hdbcli.method.lidb import Theta
from hdbcli.model.base import Base, open_base
from hdbcli.model.sample import generate
from hdbcli.training.refine import train, trainable_lidb
from registry.errors import HdbError, UsageError
from registry.stable_diffusion.families import FAMILIES

BASE = "tiny"
IN_CLONE = (Path(__file__).parents[2] / "benchmarks/sd15.py").is_file()  # of the repository


def run(names: Sequence[str], people: Path | None, tell: Tell) -> Iterator[Row]:
    """Run the benchmarks of these names, all that are here if there are none; HdbError for
    unknown ones.

    `people` is a folder of photos that none of them learned from, for those that draw people.
    """
    unknown = [name for name in names if name not in BENCHMARKS]
    if unknown:
        raise UsageError(f"unknown benchmark {unknown[0]!r}; choose from {', '.join(BENCHMARKS)}")
    usual = [name for name in BENCHMARKS if people or name != "derived"]
    chosen = names or [name for name in usual if IN_CLONE or name in LIGHT]
    for done, name in enumerate(chosen):
        tell(name, done, len(chosen))
        yield from BENCHMARKS[name](people, tell)


def _basis(*_: object) -> list[Row]:
    """SD 1.5's basis, which no identity stores, on one core."""
    shapes = target_shapes(FAMILIES["sd1"])
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        seconds = timed(
            lambda: [
                (down_basis(0, name, 100, m), up_basis(0, name, 50, n))
                for name, (n, m) in shapes.items()
            ]
        )
    finally:
        torch.set_num_threads(threads)
    return [Row(f"basis of SD 1.5's {len(shapes)} targets, one core", seconds, "s", below=2)]


def _people(*_: object) -> list[Row]:
    """Four people in one pass against four pictures of one person."""
    base = open_base(BASE)
    first = base.first_theta(rank=4, people=4)
    four = Theta(first.down, torch.randn(first.up.shape).to(first.up) * 0.02)

    def draw(adapter: Theta) -> None:
        generate(base, adapter, PORTRAIT, range(4), base.spec.sampling, lambda *_: None)

    ratio = paired(lambda: draw(four), lambda: draw(four[:1]))
    return [Row("4 people in a batch / 4 pictures of one person", ratio, "x", below=1.3)]


def _bank(*_: object) -> list[Row]:
    """People optimised 64 at a time against one by one."""
    base = open_base(BASE)
    alone, together = (_optimise(base, people) / people for people in (1, 64))
    steps = BankConfig.steps
    return [
        Row(f"bank of {steps} steps, 64 at once", 60 / (together * steps), "people/min"),
        Row(f"bank of {steps} steps, one by one", 60 / (alone * steps), "people/min"),
        Row("bank, 64 at once / one by one", alone / together, "x", above=3),
    ]


def _optimise(base: Base, people: int) -> float:
    """Return the median seconds of one step of `people` people."""
    latents = [torch.zeros(1, *base.latent_shape)] * people
    trainable = trainable_lidb(base, base.first_theta(people=people))
    config = BankConfig(steps=ROUNDS + 2).refine()
    return statistics.median(step_seconds(train(base, trainable, latents, config))[2:])


def _merge(*_: object) -> list[Row]:
    """A checkpoint of SD 1.5's size, merged and, beside it, copied, synced and hashed."""
    rows = []
    with scratch() as folder:
        file = folder / "sd15.safetensors"
        write_random("sd1", file)
        hdb("base", "add", "sd15", str(file))
        random_identity("sd15", "someone")
        hdb("merge", "someone=0", "--out", str(folder / "folder"))
        hdb("base", "add", "sd15-folder", str(folder / "folder"))
        for base, source in (("sd15", file), ("sd15-folder", folder / "folder")):
            copy, out = folder / "copy", folder / f"merged{source.suffix}"
            verbs = f"cp -r {source} {copy} && sync && find {copy} -type f | xargs sha256sum"
            plain = measured(["sh", "-c", verbs])[0]
            seconds, memory = hdb("merge", "someone", "--base", base, "--out", str(out))
            subprocess.run(["rm", "-rf", str(copy), str(out)], check=True)
            size = sum(f.stat().st_size for f in [source, *source.rglob("*")] if f.is_file())
            kind = "single file" if source == file else "folder"
            rows += [
                Row(f"merge, {kind} of {size / 1e9:.1f} GB", seconds, "s", 1.6 * plain + 4),
                Row(f"cp, sync, sha256sum of the {kind}", plain, "s"),
                Row(f"merge, {kind}, peak memory", memory / 1e6, "MB", below=700),
            ]
    return rows


def _heavy(name: str, people: Path | None, tell: Tell) -> Iterable[Row]:
    """Run one that lies in the repository alone; HdbError where hdb is installed without it."""
    if not IN_CLONE:
        raise HdbError(
            f"benchmark {name} comes with the repository of hdb, not with the package; clone it, "
            "and there: pip install -e ."
        )
    return import_module(f"benchmarks.{name}").run(people, tell)


Run: TypeAlias = Callable[[Path | None, Tell], Iterable[Row]]
LIGHT: dict[str, Run] = {"basis": _basis, "people": _people, "bank": _bank, "merge": _merge}
BENCHMARKS: dict[str, Run] = LIGHT | {
    name: partial(_heavy, name) for name in ("sd15", "train", "derived", "device")
}
