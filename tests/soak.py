"""Let many processes work on one store at once, and kill some of them: nothing may be lost.

    python tests/soak.py --operations 500 --processes 8

Each operation is a command of hdb in a process of its own, forked from one that has loaded the
libraries. Every slot owns a few names that it alone changes, so that what must be there is known
after every command: killed by SIGKILL, a command has done all or nothing. All slots also take,
copy and delete the same shared names, where a refusal is right and a damaged file is not. At the
end `hdb verify` reads every identity, `hdb gc` deletes, and nothing but identities may be left. The
operations are a function of the seed, what is killed when is not. Prints one line, and what went
wrong; then the exit code is 1.
"""

from __future__ import annotations

import argparse
import importlib
import os
import random
import re
import signal
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

PHOTO = Path(__file__).parent / "data" / "astronaut.png"
KILLED = 0.2  # share of the commands
FIRST_GUESS = 3.0  # seconds of a command, until one of its kind has ended
SHARED = ("shared-a", "shared-b", "shared-c")
OWN = 4  # names of a slot
STUCK = 300.0  # seconds of one command


@dataclass
class Command:
    """One command of a slot: its words, and what it changes of the slot's own names."""

    words: list[str]
    appears: str | None = None
    goes: str | None = None
    started: float = 0.0
    killed_after: float | None = None
    log: Path = Path()


@dataclass
class Slot:
    """What one process after the other does, and the own names that must be there."""

    number: int
    rng: random.Random
    there: set[str] = field(default_factory=set)
    command: Command | None = None

    def next(self, folder: Path) -> Command:
        """Choose a command that ought to work, on own names, or one on shared names that may be
        refused."""
        names = [f"p{self.number}-{i}" for i in range(OWN)]
        there, free = sorted(self.there), [n for n in names if n not in self.there]
        if self.rng.random() < 0.3:
            one, two = self.rng.sample(SHARED, 2)
            return Command(
                self.rng.choice(
                    [
                        ["cp", one, two, "--force"],
                        ["rm", one, "--yes"],
                        ["new", str(PHOTO), one, "--no-refine", "--force", "--yes"],
                        ["compose", one, two, "--as", two, "--force"],
                        ["list"],
                    ]
                )
            )
        if free and (not there or self.rng.random() < 0.4):
            name = free[0]
            if len(there) > 1 and self.rng.random() < 0.5:
                parts = [f"{there[0]}=0.5", f"{there[1]}=0.5"]
                return Command(["compose", *parts, "--as", name], appears=name)
            if there and self.rng.random() < 0.5:
                return Command(["cp", there[0], name], appears=name)
            made = ["new", str(PHOTO), name, "--no-refine", "--yes"]
            return Command(made, appears=name)
        name = self.rng.choice(there)
        if free and self.rng.random() < 0.3:
            return Command(["mv", name, free[0]], appears=free[0], goes=name)
        if self.rng.random() < 0.4:
            return Command(["rm", name, "--yes"], goes=name)
        out = str(folder / f"{name}.png")
        return Command(
            ["gen", name, "a [V] face", "-n", "1", "--steps", "2", "--seed", "0", "-o", out]
        )


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--operations", type=int, default=500)
    parser.add_argument("--processes", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="hdb-soak-") as folder:
        return soak(Path(folder), options.operations, options.processes, options.seed)


def soak(folder: Path, operations: int, processes: int, seed: int) -> int:
    """Run so many commands, so many at a time; return the exit code."""
    os.environ.update(HDB_HOME=str(folder / "store"), OMP_NUM_THREADS="1")
    _load()
    slots = [Slot(i, random.Random(f"{seed}-{i}")) for i in range(processes)]
    running: dict[int, Slot] = {}
    started, done, wrong = 0, Counter[int](), list[str]()
    usual: dict[str, float] = {}  # seconds of the last command of each kind that ended by itself
    start = time.perf_counter()
    while started < operations or running:
        for slot in slots:
            if slot.command is None and started < operations:
                running[_start(slot, folder, started, usual)] = slot
                started += 1
        for process, slot in running.items():
            command = slot.command
            age = time.perf_counter() - command.started
            if age > STUCK or (command.killed_after is not None and age > command.killed_after):
                os.kill(process, signal.SIGKILL)
        process, status = os.waitpid(-1, os.WNOHANG)
        if not process:
            time.sleep(0.005)
            continue
        slot = running.pop(process)
        code = os.waitstatus_to_exitcode(status)
        done[code] += 1
        if code == 0:
            usual[slot.command.words[0]] = time.perf_counter() - slot.command.started
        wrong += _check(slot, code, folder)
        slot.command = None
    seconds = time.perf_counter() - start
    wrong += _check_end(folder)
    for line in wrong:
        print(line)
    print(
        f"{operations} commands of {processes} processes in {seconds:.0f} s: {done[0]} done, "
        f"{done[-signal.SIGKILL]} killed, {done[1] + done[2]} refused, {len(wrong)} failures"
    )
    return 1 if wrong else 0


def _load() -> None:
    """Load what commands load, once for all."""
    for name in (
        "hdbcli.api",
        "hdbcli.cli.main",
        "hdbcli.faces.embedding",
        "hdbcli.training.personalise",
        "registry.stable_diffusion.loading",
    ):
        importlib.import_module(name)


def _start(slot: Slot, folder: Path, number: int, usual: dict[str, float]) -> int:
    """Fork the slot's next command; return its process. One in five is to be killed at any moment
    of the time that its kind usually takes, the last ones too, when files are written."""
    command = slot.command = slot.next(folder)
    command.log = folder / f"{number}.log"
    command.started = time.perf_counter()
    if slot.rng.random() < KILLED:
        command.killed_after = slot.rng.random() * usual.get(command.words[0], FIRST_GUESS)
    log = os.open(command.log, os.O_CREAT | os.O_WRONLY)
    process = os.fork()
    if process:
        os.close(log)
        return process
    os.chdir(folder)  # where a command leaves pictures
    nowhere = os.open(os.devnull, os.O_RDONLY)
    for stream, target in ((nowhere, 0), (log, 1), (log, 2)):
        os.dup2(stream, target)
    sys.argv = ["hdb", *command.words]
    from hdbcli.__main__ import main as run

    code: object = 70
    try:
        run()
        code = 0
    except SystemExit as end:
        code = end.code or 0
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code if isinstance(code, int) else 1)


def _check(slot: Slot, code: int, folder: Path) -> list[str]:
    """Hold what a command left against what it should have: all of it, or where it was killed
    nothing or all."""
    command = slot.command
    what = " ".join(command.words)
    said = command.log.read_text(errors="replace")
    command.log.unlink()
    wrong = []
    if "Traceback" in said or code not in (0, 1, 2, -signal.SIGKILL):
        wrong.append(f"{what}: exit code {code}\n{said}")
    if code == -signal.SIGKILL and command.killed_after is None:
        wrong.append(f"{what}: stuck for {STUCK:.0f} s\n{said}")
    own = command.appears or command.goes
    if code in (1, 2) and (own or command.words[0] == "gen"):
        wrong.append(f"{what}: refused\n{said}")
    expected = set(slot.there)
    if command.appears:
        expected.add(command.appears)
    expected.discard(command.goes or "")
    found = {n for n in _names(folder) if re.fullmatch(rf"p{slot.number}-\d+", n)}
    allowed = [expected] if code == 0 else [slot.there, expected]
    if found not in allowed:
        wrong.append(f"{what}: exit code {code}, there is {sorted(found)}, expected {allowed}")
    slot.there = found
    return wrong


def _names(folder: Path) -> set[str]:
    place = folder / "store" / "identities"
    return {path.stem for path in place.glob("*.safetensors")} if place.is_dir() else set()


def _check_end(folder: Path) -> list[str]:
    """Verify every identity in full, and look for anything else after the garbage collection."""
    from commands import hdb

    from registry import orphans

    place = folder / "store"
    for path in place.rglob("*.tmp"):  # hdb gc leaves alone what may be in the writing
        os.utime(path, (0, 0))
    before = len(orphans.temporaries())
    wrong = [r.stdout + r.stderr for r in (hdb("verify"), hdb("gc")) if r.exit_code]
    print(f"{len(_names(folder))} identities, {before} temporary files before hdb gc")
    odd = [
        path
        for path in place.rglob("*")
        if path.is_file()
        and not (path.parent.name == "identities" and path.suffix == ".safetensors")
    ]
    return wrong + [f"left over: {path.relative_to(place)}" for path in odd]


if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parent)]
    sys.exit(main())
