"""What a container allows is found in every version of control groups, and torch keeps to it."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from hdbcli.limits import (
    SELDOM,
    SPINS,
    THREADS,
    WAITING,
    cpus,
    free_in_container,
    free_ram,
    loading,
    set_threads,
)

MANY = 64  # processors that the process is bound to, in these tests
V1 = "33 32 0:30 {root} /sys/fs/cgroup/{name} rw,relatime shared:9 - cgroup cgroup rw,{name}\n"
V2 = "34 32 0:31 {root} /sys/fs/cgroup rw,relatime - cgroup2 cgroup2 rw,nsdelegate\n"


@pytest.fixture
def system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make the files of a machine with 4,096 MB free and no container."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(MANY)), raising=False)
    write(tmp_path / "proc/meminfo", "MemFree: 1 kB\nMemAvailable:    4000000 kB\n")
    return tmp_path


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def in_group(system: Path, lines: str, mounts: str) -> None:
    write(system / "proc/self/cgroup", lines)
    write(system / "proc/self/mountinfo", mounts)


def group(system: Path, name: str, **values: object) -> None:
    for key, value in values.items():
        controller, _, rest = key.partition("_")
        write(system / "sys/fs/cgroup" / name / f"{controller}.{rest}", f"{value}\n")


def test_without_a_container_all_is_to_be_had(system: Path) -> None:
    assert free_ram(system) == 4_096_000_000 and free_in_container(system) is None
    assert cpus(system) == MANY
    assert (free_ram(system / "elsewhere") or 1) > 0 and (free_ram() or 1) > 0 and cpus() >= 1


def test_version_2_counts_every_slice_above(system: Path) -> None:
    in_group(system, "0::/user.slice/work/job\n", V2.format(root="/"))
    group(system, "user.slice/work/job", memory_max="max", memory_high="max", cpu_max="max 100000")
    group(system, "user.slice/work/job", memory_current=100, memory_stat="inactive_file 40")
    assert free_in_container(system) is None and cpus(system) == MANY  # the control
    group(system, "user.slice", memory_max=2000, memory_current=1500, cpu_max="350000 100000")
    group(system, "user.slice", memory_stat="anon 1000\ninactive_file 400")
    assert free_ram(system) == free_in_container(system) == 2000 - 1500 + 400
    assert cpus(system) == 4  # three and a half
    group(system, "user.slice/work", memory_high=1000, memory_current=300, cpu_max="150000 100000")
    assert free_in_container(system) == 700 and cpus(system) == 2
    group(system, "user.slice/work/job", memory_max=150, cpu_max="10000 100000")
    assert free_in_container(system) == 150 - 100 + 40 and cpus(system) == 1
    group(system, "user.slice/work/job", memory_current=400)  # above a limit that was lowered
    assert free_in_container(system) == 0


def test_version_2_within_a_container_of_its_own(system: Path) -> None:
    in_group(system, "0::/\n", V2.format(root="/"))
    group(system, "", memory_max=9_000_000, memory_current=1_000_000, cpu_max="200000 100000")
    assert free_ram(system) == 8_000_000 and cpus(system) == 2


@pytest.mark.parametrize("root", ["/docker/abc", "/"])
def test_version_1(root: str, system: Path) -> None:
    inside = "" if root != "/" else "docker/abc"
    lines = "5:memory:/docker/abc\n3:cpu,cpuacct:/docker/abc\n0::/\n"
    mounts = "".join(V1.format(root=root, name=name) for name in ("memory", "cpu"))
    in_group(system, lines, mounts.replace("rw,cpu", "rw,cpu,cpuacct"))
    none = 2**63 - 4096
    group(system, f"memory/{inside}", memory_limit_in_bytes=none, memory_usage_in_bytes=70)
    group(system, f"cpu/{inside}", cpu_cfs_quota_us=-1, cpu_cfs_period_us=100_000)
    assert free_ram(system) == 4_096_000_000 and cpus(system) == MANY  # the control
    group(system, f"memory/{inside}", memory_limit_in_bytes=1000)
    group(system, f"memory/{inside}", memory_stat="inactive_file 1\ntotal_inactive_file 20")
    group(system, f"cpu/{inside}", cpu_cfs_quota_us=250_000)
    assert free_ram(system) == 1000 - 70 + 20 and cpus(system) == 3
    unseen = "total_inactive_file 20\nhierarchical_memory_limit 500"  # of a group above
    group(system, f"memory/{inside}", memory_stat=unseen)
    assert free_ram(system) == 500 - 70 + 20


def test_a_mount_with_a_space_in_its_name(system: Path) -> None:
    in_group(system, "0::/\n", V2.format(root="/").replace("fs/cgroup", r"fs/c\040group"))
    write(system / "sys/fs/c group/cpu.max", "100000 100000")
    assert cpus(system) == 1


def test_the_users_own_environment_stays(system: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    in_group(system, "0::/\n", V2.format(root="/"))
    group(system, "", cpu_max="300000 100000")
    names = (*WAITING, THREADS, "GOMP_SPINCOUNT", "KMP_LIBRARY")

    def after(**own: str) -> dict[str, str]:
        for name in names:
            monkeypatch.delenv(name, raising=False)
        for name, value in own.items():
            monkeypatch.setenv(name, value)
        set_threads(system)
        return {name: os.environ[name] for name in names if name in os.environ}

    assert after() == {**WAITING, THREADS: "3"}
    assert after(OMP_NUM_THREADS="7") == {**WAITING, THREADS: "7"}
    for name, value in (("OMP_WAIT_POLICY", "ACTIVE"), ("GOMP_SPINCOUNT", "9")):
        assert after(**{name: value}) == {name: value, THREADS: "3"}
    group(system, "", cpu_max="max 100000")
    assert after() == WAITING  # torch itself knows best where nothing limits it
    monkeypatch.setattr(os, "cpu_count", lambda: MANY)
    for running, more in ((1, SPINS), (2, {})):  # this process alone, and one beside it
        write(system / "proc/loadavg", f"9.00 9.00 9.00 {running}/204 30122\n")
        assert after() == {**WAITING, **more}, "spinning is for machines that are idle"
    assert after(OMP_WAIT_POLICY="PASSIVE") == {"OMP_WAIT_POLICY": "PASSIVE"}
    monkeypatch.setattr("time.sleep", lambda _: write(system / "proc/loadavg", "9 9 9 1/204 30\n"))
    assert after() == {**WAITING, **SPINS}, "what ran for a moment is no work beside it"


@pytest.mark.parametrize(
    "module", ["hdbcli.cli.main", "hdbcli.model.base", "registry.tiny.recipe.__main__"]
)
def test_every_way_in_sets_it_before_torch_is_loaded(module: str) -> None:
    """Processes of a pool, and those that accelerate starts, inherit the environment."""
    code = f"""
import json, os, sys
seen = []
class Watch:
    def find_spec(self, name, *_):
        if name == "torch":
            seen.append(os.environ.get("OMP_WAIT_POLICY"))
sys.meta_path.insert(0, Watch())
import {module}, torch
sys.stdout.write(json.dumps([seen[0], torch.get_num_threads()]))
"""
    clean = {k: v for k, v in os.environ.items() if k not in {**WAITING, **SPINS}}
    for own, wanted in (({}, "PASSIVE"), ({"OMP_WAIT_POLICY": "active"}, "active")):
        done = subprocess.run(
            [sys.executable, "-c", code],
            env={**clean, "OMP_NUM_THREADS": "1", **own},
            cwd=Path(__file__).parents[1],
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout) == [wanted, 1]


def test_garbage_is_collected_less_often_only_while_loading() -> None:
    before = gc.get_threshold()
    try:
        for own, meanwhile in ((700, SELDOM), (2 * SELDOM, 2 * SELDOM), (0, 0)):
            gc.set_threshold(own, 10, 10)
            with pytest.raises(KeyError), loading():
                assert gc.get_threshold() == (meanwhile, 10, 10)
                raise KeyError
            assert gc.get_threshold() == (own, 10, 10)
    finally:
        gc.set_threshold(*before)
