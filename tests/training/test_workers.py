"""Training in several processes, and training that was killed: the same numbers as in one go."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import typer.main
from commands import ok
from safetensors import safe_open
from safetensors.torch import load_file

from hdbcli.cli.train import train_app
from hdbcli.config import PretrainConfig
from hdbcli.method.lidb import Theta
from hdbcli.model.base import Base
from hdbcli.model.device import ALONE, Workers
from hdbcli.training.hypernetwork import Material, _described, new_hypernetwork, share_out
from hdbcli.training.people import read_people

HELD_OUT = Path(__file__).parents[1] / "data/heldout"
SCRIPT = """
import os, torch
from registry.errors import HdbError
from hdbcli.model.device import join_workers

workers = join_workers("cpu")
workers.agree("a run", 3)
for of, step in (("a run", 10 + workers.rank), (f"run {workers.rank}", 3)):
    try:
        workers.agree(of, step)
    except HdbError as error:
        print(error)
gradient = [torch.full((2,), float(workers.rank)), torch.ones(1)]
workers.share(gradient)
print("mean", gradient[0].tolist(), gradient[1].tolist())
workers.meet()
if workers.rank:
    os._exit(9)
try:
    while True:
        workers.share(gradient)
except HdbError as error:
    print(error)
"""
HDB = (sys.executable, "-m", "hdbcli")
# On a free port, whatever else trains here.
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone")
TWO = (*TORCHRUN, "--nproc_per_node", "2", "-m", "hdbcli")


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Copy a photo each of ten people, too few to hold one out and look at them."""
    folder = tmp_path_factory.mktemp("photos")
    for person in sorted(HELD_OUT.iterdir())[:10]:
        shutil.copy(person / "photo-0.jpg", folder / f"{person.name}.jpg")
    return folder


@pytest.fixture(scope="module")
def people(photos: Path) -> Path:
    """Prepare them once, for most runs."""
    prepared = photos.with_name("people")
    ok("train", "prepare", photos, "--out", prepared)
    return prepared


def command(people: Path, out: Path, **options: object) -> list[str]:
    chosen = {
        "steps": 3,
        "lr": 1e-3,
        "optimizer": "adamw",
        "precision": "fp32",
        "likeness": 1,
        "device": "cpu",  # GPUs may be fewer than processes
        **options,
    }
    words = ["train", "hypernetwork", str(people), "--out", str(out)]
    for key, value in chosen.items():
        words += [f"--{key.replace('_', '-')}", str(value)]
    return words


def run(words: list[str]) -> str:
    done = subprocess.run(words, capture_output=True, text=True, timeout=800)
    assert done.returncode == 0, done.stderr
    return done.stderr


@pytest.fixture(scope="module")
def whole(people: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train in one process and one go, with a batch of four."""
    out = tmp_path_factory.mktemp("whole") / "h.safetensors"
    ok(*command(people, out, batch=4))
    return out


def difference(a: Path, b: Path) -> float:
    """Return the mean difference of the checkpoints' weights, which are not rounded to fp16."""
    first, second = (load_file(p.with_name("h-checkpoint.safetensors")) for p in (a, b))
    names = [name for name in first if name.startswith("parameter.")]
    assert first.keys() == second.keys() and names
    return sum(float((first[n] - second[n]).abs().mean()) for n in names) / len(names)


def test_two_processes_are_one_with_twice_the_batch(
    photos: Path, people: Path, whole: Path, tmp_path: Path
) -> None:
    both, half = tmp_path / "both/h.safetensors", tmp_path / "half/h.safetensors"
    said = run([*TWO, *command(photos, both, batch=2)])  # the first of them prepares the photos
    assert said.count("step 3/3") == 1  # one of the two speaks
    ok(*command(people, half, batch=2))  # the control: half of the batch is something else
    assert difference(both, whole) < 0.02 * difference(half, whole)


def test_processes_agree_on_the_run_and_say_when_one_is_lost() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    both = [
        subprocess.Popen(
            [sys.executable, "-c", SCRIPT],
            env=os.environ | place | {"RANK": rank, "LOCAL_RANK": rank},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in "01"
    ]
    try:
        outputs = [process.communicate(timeout=800) for process in both]
    finally:
        for process in both:
            process.kill()
    first, second = (out.splitlines() for out, _ in outputs)
    assert [process.returncode for process in both] == [0, 9], outputs
    assert len(first) == 4 and len(second) == 3, outputs
    assert "process 1 starts with step 11, not 10" in first[0]
    assert "process 0 starts with step 10, not 11" in second[0]
    assert "other data or settings" in first[1] and "other data or settings" in second[1]
    assert first[2] == second[2] == "mean [0.5, 0.5] [1.0]"
    assert "another process of the training was lost" in first[3]


@pytest.mark.parametrize(
    ("batch", "count", "share"), [(2, 2, 4), (6, 2, 4), (8, 3, 4), (32, 4, 4), (6, 2, 1)]
)
def test_processes_share_out_who_is_drawn(batch: int, count: int, share: int) -> None:
    """As many as one process with the whole batch draws, each counting as much."""
    total, whole = share_out(batch * count, ALONE, share)
    parts = [share_out(batch, Workers(rank, count, None), share) for rank in range(count)]
    assert whole == 1 and total == -(-batch * count // share) == sum(mine for mine, _ in parts)
    for mine, part in parts:
        assert not mine or part / mine / count == pytest.approx(1 / total)


def test_torchrun_takes_no_option_for_its_own() -> None:
    """It reads abbreviations of its options behind the command too."""
    from torch.distributed.run import parse_args

    parameters = typer.main.get_command(train_app).commands["hypernetwork"].params  # type: ignore[attr-defined]
    options = [o for p in parameters for o in p.opts if o.startswith("--")]
    assert "--from" in options and "--likeness" in options
    for option in options:
        rest = ["train", "hypernetwork", option, "1"]
        assert parse_args(["-m", "hdbcli", *rest]).training_script_args == rest
    with pytest.raises(SystemExit):  # the control: an option that it does take
        parse_args(["-m", "hdbcli", "train", "hypernetwork", "--start", "1"])


def test_killed_and_resumed_is_the_same(people: Path, whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "h.safetensors"
    words = command(people, out, batch=4, save_seconds=0)
    process = subprocess.Popen([*HDB, *words], stderr=subprocess.DEVNULL)
    checkpoint = tmp_path / "h-checkpoint.safetensors"
    try:
        while not checkpoint.exists() and process.poll() is None:
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
    finally:
        process.kill()
        process.wait()
    assert checkpoint.exists() and not out.exists(), "it ended before it could be killed"
    ok(*words)
    for name, tensor in load_file(out).items():
        assert torch.equal(tensor, load_file(whole)[name]), name


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks for processes in /proc")
def test_two_processes_go_with_one_for_fifty_steps_though_they_are_killed(
    people: Path, tmp_path: Path
) -> None:
    whole, both, killed = (tmp_path / name / "h.safetensors" for name in ("one", "two", "killed"))
    shared = {"steps": 50, "likeness": 0}
    ok(*command(people, whole, batch=4, **shared))
    run([*TWO, *command(people, both, batch=2, **shared)])
    words = [*TWO, *command(people, killed, batch=2, save_seconds=0, **shared)]
    for step, count in ((10, 1), (30, 2)):
        kill_at(step, count, words, killed)
        assert not killed.exists(), "it ended before it could be killed"
    run(words)
    one, two, again = (load_file(p) for p in (whole, both, killed))
    far = [float((one[n] - two[n]).abs().max() / one[n].abs().max()) for n in one]
    assert max(far) < 1e-3, max(far)
    for name, tensor in two.items():
        assert torch.equal(tensor, again[name]), name


def kill_at(step: int, count: int, words: list[str], out: Path) -> None:
    """Start a training, and kill so many of its processes by SIGKILL when its checkpoint has seen
    that step."""
    checkpoint = out.with_name("h-checkpoint.safetensors")
    launcher = subprocess.Popen(words, stderr=subprocess.DEVNULL)
    try:
        while launcher.poll() is None and step_of(checkpoint) < step:
            time.sleep(0.02)
        for process in children(launcher.pid)[:count]:
            os.kill(process, signal.SIGKILL)
        assert launcher.wait(timeout=120) != 0
    finally:
        launcher.kill()
        launcher.wait()


def step_of(checkpoint: Path) -> int:
    if not checkpoint.exists():
        return 0
    with safe_open(checkpoint, framework="pt") as file:
        return int(file.metadata()["step"])


def children(parent: int) -> list[int]:
    found = []
    for state in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            fields = state.read_text().rpartition(")")[2].split()
            if int(fields[1]) == parent and "hdbcli" in (state.parent / "cmdline").read_text():
                found.append(int(state.parent.name))
    return sorted(found)


def test_a_run_is_described_with_all_that_decides_its_numbers(tiny: Base, photos: Path) -> None:
    model, config, bank = new_hypernetwork(tiny, 0), PretrainConfig(), tiny.first_theta(people=2)
    read = read_people(photos, tiny.spec, "*", False, lambda *_: None)
    one = Material(replace(read, digest="0" * 64), None)

    def told(material: Material = one, config: PretrainConfig = config, count: int = 1) -> str:
        return _described(tiny, model, material, config, "adamw", count)

    others = (
        told(one._replace(known=bank)),
        told(one._replace(known=Theta(bank.down * 2, bank.up))),
        told(one._replace(people=replace(read, digest="1" * 64))),
        told(one._replace(people=read.first(len(read.names) - 1))),
        told(config=replace(config, seed=1)),
        told(count=2),
    )
    assert len({told(), *others}) == 1 + len(others) and told() == told()
