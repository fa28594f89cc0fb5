"""What benchmarks are made of: figures with their promises, commands with seconds and memory, and a
place to work in."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from hdbcli.identity.file import Identity, facts_of, save
from hdbcli.model.files import open_checkpoint
from registry import store
from registry.errors import HdbError
from registry.plugins import load_registry

ROUNDS = 5
_STARTER = """
import json, os, subprocess, sys, time
start = time.perf_counter()
process = subprocess.Popen(sys.argv[1:], stdout=subprocess.DEVNULL)
_, status, usage = os.wait4(process.pid, 0)
print(json.dumps([time.perf_counter() - start, status, usage.ru_maxrss]))
"""


@dataclass(frozen=True)
class Row:
    """One figure, and what it may be at most or at least, where hdb promises that."""

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
        return low and (self.below is None or self.value <= self.below)


def random_identity(base: str, name: str) -> None:
    """Store an identity of rank 4 that fits an added base."""
    spec = load_registry().get(base)
    checkpoint = open_checkpoint(spec)
    count = len(checkpoint.places)
    down, up = torch.randn(count, 4, spec.a) * 0.1, torch.randn(count, spec.b, 4) * 0.1
    save(Identity(facts_of(spec, checkpoint), down, up), store.path_of(name), "int8")


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
    """Run a command; return its seconds and its peak of resident memory in bytes.

    Linux counts to a new program what the one that starts it holds, so a small one does.
    """
    starter = [sys.executable, "-S", "-c", _STARTER, *command]
    done = subprocess.run(starter, capture_output=True, text=True)
    seconds, status, peak = json.loads(done.stdout)
    if status:
        raise HdbError(f"{' '.join(command)} failed: {done.stderr.strip()[-300:]}")
    return seconds, peak * (1 if sys.platform == "darwin" else 1024)


def paired(one: Callable[[], object], other: Callable[[], object], rounds: int = ROUNDS) -> float:
    """Return the median of time ratios, taken in turns, so that a busy machine slows both."""
    one(), other()
    return statistics.median(timed(one) / timed(other) for _ in range(rounds))


def timed(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start
