"""What this process may use of the machine: processors and memory, within its container's limits.

A container is a control group (cgroup) of Linux, version 1 or 2. Groups are nested, and a limit of
any group above counts too, so each is looked at from the process's own up to the root.
"""

from __future__ import annotations

import gc
import math
import os
import re
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

# How OpenMP's threads wait for work, as libgomp (Linux) and libomp (macOS, Windows) read it.
WAITING = {"OMP_WAIT_POLICY": "PASSIVE", "KMP_BLOCKTIME": "0"}
OTHER_WAITING = ("GOMP_SPINCOUNT", "KMP_LIBRARY")
SPINS = {"GOMP_SPINCOUNT": "10000"}  # looks at what is waited for before a thread sleeps: ~0.2 ms
THREADS = "OMP_NUM_THREADS"
LOOKS = 5  # at what runs, 2 ms apart
SELDOM = 20_000  # new objects until the next garbage collection; Python's own is 700 or 2,000


def set_threads(system: Path = Path("/")) -> None:
    """Let torch's threads sleep while they wait, and be no more than the processors to be had.

    By default they spin: beside one busy process on two cores a picture then takes twelve times as
    long. But waking them takes as long as a small product, and one person's refinement is made of
    those: where nothing else runs as hdb starts, they spin for a moment first, which makes it 1.8
    times as fast. OpenMP reads the environment when torch is loaded, so this runs before, and what
    the user set there stays. It knows the processors that a process is bound to, but no
    container's quota.
    """
    there, allowed = _bound_cpus(), cpus(system)
    if not any(name in os.environ for name in (*WAITING, *OTHER_WAITING)):
        os.environ.update(WAITING)
        if _idle(system, allowed):
            os.environ.update(SPINS)
    if THREADS in os.environ:
        return
    if allowed < there:
        os.environ[THREADS] = str(allowed)
        torch = sys.modules.get("torch")
        if torch is not None and torch.get_num_threads() > allowed:  # imported before hdbcli
            torch.set_num_threads(allowed)


def _idle(system: Path, threads: int) -> bool:
    """Say whether so many threads leave the machine's other tasks a processor each, by how many
    Linux says run at this moment, this one among them: by the fewest of LOOKS, since what is busy
    runs every time, and what has a moment's work does not."""
    for look in range(LOOKS):
        time.sleep(0.002 if look else 0)
        try:
            running = int(re.findall(r" (\d+)/\d+ ", (system / "proc/loadavg").read_text())[0])
        except (OSError, IndexError):
            return False
        if running - 1 + threads <= (os.cpu_count() or 1):
            return True
    return False


@contextmanager
def loading() -> Iterator[None]:
    """Collect garbage less often while libraries and a model are loaded.

    That makes a million objects, which stay: to look through them again and again, as Python does,
    takes a tenth of the time until the first step of a picture. Afterwards it collects as usual,
    since garbage may hold tensors.
    """
    before = gc.get_threshold()
    if before[0]:  # 0 is the user's own wish to collect none
        gc.set_threshold(max(SELDOM, before[0]), *before[1:])
    try:
        yield
    finally:
        gc.set_threshold(*before)


def cpus(system: Path = Path("/")) -> int:
    """Return how many processors this process may keep busy: those it is bound to, or the quota of
    its container, rounded up."""
    quotas = [_quota(group) for group in [*_groups(system, "cpu"), *_groups(system, "")]]
    return max(1, min([_bound_cpus(), *(math.ceil(q) for q in quotas if q is not None)]))


def free_ram(system: Path = Path("/")) -> int | None:
    """Return the bytes of memory that can be had without swapping, within a container's limits;
    half of all where only that is known, None where nothing is."""
    try:
        text = (system / "proc/meminfo").read_text()
        free = 1024 * int(re.findall(r"^MemAvailable:\s+(\d+) kB", text, re.MULTILINE)[0])
    except (OSError, IndexError):
        if not hasattr(os, "sysconf"):  # Windows
            return None
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    left = free_in_container(system)
    return free if left is None else min(free, left)


def free_in_container(system: Path = Path("/")) -> int | None:
    """Return the bytes that a container's limits leave to this process, None where none limits it.

    Files that the system keeps in memory and has not used lately count as free.
    """
    free = [_room_v1(group) for group in _groups(system, "memory")]
    free += [_room_v2(group) for group in _groups(system, "")]
    return min((max(0, room) for room in free if room is not None), default=None)


def _bound_cpus() -> int:
    if hasattr(os, "sched_getaffinity"):  # Linux
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _groups(system: Path, controller: str) -> Iterator[Path]:
    """Yield the folders of this process's control group and of all above it, for a controller of
    version 1, or for version 2, which has one tree for all, if that is ""."""
    own: str | None = None
    with suppress(OSError):
        for line in (system / "proc/self/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if controller in controllers.split(","):
                own = path
    if own is None:
        return
    kind = "cgroup" if controller else "cgroup2"
    with suppress(OSError):
        for line in (system / "proc/self/mountinfo").read_text().splitlines():
            before, _, after = line.partition(" - ")
            root, mounted = (_unescaped(word) for word in before.split(" ")[3:5])
            there, _, options = after.split(" ", 2)
            if there != kind or (controller and controller not in options.split(",")):
                continue
            # In a container the tree may begin at its own group.
            inside = os.path.relpath(own, root) if Path(own).is_relative_to(root) else "."
            top = system / mounted.lstrip("/")
            group = top / inside
            yield from [group, *(above for above in group.parents if above.is_relative_to(top))]
            return


def _unescaped(word: str) -> str:
    """Decode a path of mountinfo, in which a space is \\040."""
    return re.sub(r"\\([0-7]{3})", lambda octal: chr(int(octal[1], 8)), word)


def _number(file: Path) -> int | None:
    try:
        return int(file.read_text())
    except (OSError, ValueError):  # not there, or "max": no limit
        return None


def _statistics(group: Path) -> dict[str, int]:
    found: dict[str, int] = {}
    with suppress(OSError, ValueError):
        for line in (group / "memory.stat").read_text().splitlines():
            key, _, value = line.partition(" ")
            found[key] = int(value)
    return found


def _room_v2(group: Path) -> int | None:
    limits = [_number(group / name) for name in ("memory.max", "memory.high")]
    limit = min((each for each in limits if each is not None), default=None)
    used = _number(group / "memory.current")
    if limit is None or used is None:
        return None
    return limit - used + _statistics(group).get("inactive_file", 0)


def _room_v1(group: Path) -> int | None:
    limit, used = (_number(group / f"memory.{n}_in_bytes") for n in ("limit", "usage"))
    if limit is None or used is None:
        return None
    known = _statistics(group)
    # That of the groups above, which a container may not see; without a limit it is huge.
    limit = min(limit, known.get("hierarchical_memory_limit", limit))
    return limit - used + known.get("total_inactive_file", 0)


def _quota(group: Path) -> float | None:
    """Return the processors that a group may use, as a fraction; None without a quota."""
    with suppress(OSError, ValueError):
        quota, period = (group / "cpu.max").read_text().split()  # version 2
        return int(quota) / int(period)  # "max" is not a number
    quota_v1, period_v1 = (_number(group / f"cpu.cfs_{n}_us") for n in ("quota", "period"))
    return quota_v1 / period_v1 if quota_v1 and period_v1 and quota_v1 > 0 else None
