"""Benchmarks: what hdb promises, each measured against the plain alternative in the same run."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch

from hdbcli.base import Base, open_base
from hdbcli.basis import down_basis, up_basis
from hdbcli.config import PORTRAIT, BankConfig, Tell
from hdbcli.device import make_optimizer
from hdbcli.errors import HdbError
from hdbcli.identity import Identity, home_of, save
from hdbcli.lidb import Theta, first_theta
from hdbcli.places import open_checkpoint
from hdbcli.random_model import target_shapes, write_random
from hdbcli.refine import lidb_trial, train
from hdbcli.sample import generate
from registry.families import FAMILIES
from registry.plugins import load_registry
from registry.spec import SampleSettings

ROUNDS = 5
BASE = "tiny"


@dataclass(frozen=True)
class Row:
    """One figure, and what it has to stay below or reach, where hdb promises that."""

    name: str
    value: float
    unit: str
    below: float | None = None
    above: float | None = None

    @property
    def kept(self) -> bool | None:
        """Say whether the promise is kept; None without one."""
        if self.below is None and self.above is None:
            return None
        low = self.above is None or self.value >= self.above
        return low and (self.below is None or self.value < self.below)


def run(names: Sequence[str], tell: Tell) -> Iterator[Row]:
    """Run the benchmarks of these names, all if there are none; HdbError for unknown ones."""
    unknown = [name for name in names if name not in BENCHMARKS]
    if unknown:
        raise HdbError(f"unknown benchmark {unknown[0]!r}; choose from {', '.join(BENCHMARKS)}")
    chosen = list(names or BENCHMARKS)
    for done, name in enumerate(chosen):
        tell(name, done, len(chosen))
        yield from BENCHMARKS[name]()


def _basis() -> list[Row]:
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


def _people() -> list[Row]:
    """Four people in one pass against four pictures of one person."""
    base = open_base(BASE)
    first = first_theta(len(base.injected.layers), base.spec.a, base.spec.b, 4)
    four = Theta(first.down.repeat(4, 1, 1, 1), torch.randn(4, *first.up.shape[1:]) * 0.02)

    def draw(worn: Theta) -> None:
        generate(base, worn, PORTRAIT, range(4), SampleSettings(), lambda *_: None)

    ratio = paired(lambda: draw(four), lambda: draw(four[:1]))
    return [Row("4 people in a batch / 4 pictures of one person", ratio, "x", below=1.3)]


def _bank() -> list[Row]:
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
    """Return the median seconds of one step of so many people."""
    first = first_theta(len(base.injected.layers), base.spec.a, base.spec.b)
    theta = Theta(*(core.expand(people, -1, -1, -1) for core in (first.down, first.up)))
    side = base.spec.resolution
    latents = [base.backbone.encode_images(torch.zeros(1, 3, side, side)) for _ in range(people)]
    trial, config = lidb_trial(base, theta), BankConfig(steps=ROUNDS + 2).refine()
    optimizer, _, _ = make_optimizer(config.optimizer, trial.parameters.values(), config.lr)
    marks = [time.perf_counter()]
    for _ in train(base, trial, latents, config, optimizer):
        marks.append(time.perf_counter())
    return statistics.median(after - before for before, after in pairwise(marks[2:]))


def _merge() -> list[Row]:
    """A checkpoint of SD 1.5's size, merged and, beside it, copied, synced and hashed."""
    rows = []
    with scratch() as folder:
        file = folder / "sd15.safetensors"
        write_random("sd1", file)
        hdb("base", "add", "sd15", str(file))
        _random_identity("sd15")
        hdb("merge", "someone=0", "--out", str(folder / "folder"))
        hdb("base", "add", "sd15-folder", str(folder / "folder"))
        for base, source in (("sd15", file), ("sd15-folder", folder / "folder")):
            copy, out = folder / "copy", folder / f"merged{source.suffix}"
            verbs = f"cp -r {source} {copy} && sync && find {copy} -type f | xargs sha256sum"
            plain, _ = measured(["sh", "-c", verbs])
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


def _random_identity(base: str) -> None:
    """Store `someone`, an identity of rank 4 that fits an added base."""
    from registry import store

    spec = load_registry().get(base)
    checkpoint = open_checkpoint(spec)
    count = len(checkpoint.places)
    identity = Identity(
        down=torch.randn(count, 4, spec.a) * 0.1,
        up=torch.randn(count, spec.b, 4) * 0.1,
        **home_of(spec, checkpoint),
        identifier=spec.identifier,
        steps=0,
        optimizer="",
        hypernetwork="",
        created="2026-01-01T00:00:00+00:00",
    )
    save(identity, store.path_of("someone"), "int8")


@contextmanager
def scratch() -> Iterator[Path]:
    """Work in a folder, and a store, that go away; on the disk of the current folder."""
    before = os.environ.get("HDB_HOME")
    with tempfile.TemporaryDirectory(prefix=".hdb-bench-", dir=".") as folder:
        os.environ["HDB_HOME"] = str(Path(folder).absolute() / "home")
        try:
            yield Path(folder).absolute()
        finally:
            os.environ.pop("HDB_HOME")
            if before is not None:
                os.environ["HDB_HOME"] = before


def hdb(*words: str) -> tuple[float, int]:
    return measured([sys.executable, "-m", "hdbcli", *words])


def measured(command: Sequence[str]) -> tuple[float, int]:
    """Run a command; return its seconds and its peak of resident memory in bytes."""
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    assert process.stderr is not None
    said = process.stderr.read().decode(errors="replace")
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - start
    if os.waitstatus_to_exitcode(status):
        raise HdbError(f"{' '.join(command)} failed: {said.strip()[-300:]}")
    return seconds, usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def paired(one: Callable[[], object], other: Callable[[], object]) -> float:
    """Return the median of time ratios, taken in turns, so that a busy machine slows both."""
    one(), other()
    return statistics.median(timed(one) / timed(other) for _ in range(ROUNDS))


def timed(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


BENCHMARKS: dict[str, Callable[[], list[Row]]] = {
    "basis": _basis,
    "people": _people,
    "bank": _bank,
    "merge": _merge,
}
