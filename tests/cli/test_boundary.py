"""What happens at the edge: errors of the system, signals, questions, and others who
write meanwhile."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import typer
from commands import DRAWN, QUICK, hdb, ok, refused

from hdbcli.api import Drawn, Picture
from hdbcli.cli import boundary
from hdbcli.cli import store as cli_store
from hdbcli.cli.outputs import Album, Outputs, plan_outputs
from hdbcli.config import DIFFUSION_LR, UNPREDICTED_LR, RefineConfig
from hdbcli.identity import derivation
from hdbcli.identity.file import Identity, load, save
from hdbcli.method.algebra import compose
from hdbcli.method.lidb import Theta
from hdbcli.model.base import Base
from hdbcli.training import personalise
from hdbcli.training.refine import Refined
from registry import store
from registry.errors import HdbError
from registry.stable_diffusion import backbone

STOPPED = """
import os, signal, sys
from hdbcli.cli import main as cli
from registry import store
if int(sys.argv[1]):  # whatever the shell that runs the tests wants, nohup for one
    signal.signal(int(sys.argv[1]), getattr(signal, sys.argv[3]))
def entries():
    try:
        os.kill(os.getpid(), int(sys.argv[1]))
    except KeyboardInterrupt:
        if sys.argv[2] == "hidden":
            raise RuntimeError("half of a library was loaded")
        raise
store.entries = entries
cli.app(["list"])
"""


@pytest.mark.parametrize("hidden", ["hidden", "open"])
@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_signals_end_a_command_in_one_line(name: str, hidden: str, hdb_home: Path) -> None:
    number = getattr(signal, name)

    def run(number: int, before: str) -> subprocess.CompletedProcess[str]:
        words = [sys.executable, "-c", STOPPED, str(int(number)), hidden, before]
        return subprocess.run(words, capture_output=True, text=True, check=False)

    done = run(number, "default_int_handler" if name == "SIGINT" else "SIG_DFL")
    assert done.returncode == 128 + number
    assert done.stderr == "interrupted; no file was left half-written\n"
    assert run(number, "SIG_IGN").returncode == 0  # as nohup wants
    assert run(0, "").returncode == 0  # the control: signal 0 is none


def test_a_question_is_answered_or_interrupted(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def answer(reply: bool | BaseException) -> Callable[..., bool]:
        def confirm(*_: object, **__: object) -> bool:
            if isinstance(reply, bool):
                return reply
            try:
                raise reply
            except BaseException:
                raise typer.Abort from None

        return confirm

    monkeypatch.setattr(typer, "confirm", answer(True))
    boundary.ask("Sure?")
    monkeypatch.setattr(typer, "confirm", answer(False))
    with pytest.raises(typer.Exit):
        boundary.ask("Sure?")
    assert "nothing was done" in capsys.readouterr().err
    monkeypatch.setattr(typer, "confirm", answer(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        boundary.ask("Sure?")
    monkeypatch.setattr(typer, "confirm", answer(EOFError()))
    with pytest.raises(typer.Abort):
        boundary.ask("Sure?")


def test_errors_of_the_system_are_lines(alice: Path, tmp_path: Path) -> None:
    long = "a" * 300
    for words in (
        ("gen", "alice", "x", "-o", long),
        ("merge", "alice", "-o", tmp_path / long),
        ("export", "alice", "-o", f"{long}.safetensors"),
        ("base", "add", "foo", long),
    ):
        assert "too long" in refused(*words, says="aaa")
    said = refused("base", "add", "tiny", tmp_path, says="a base model tiny already")
    assert "hdb base rm" not in said  # which would refuse: it ships
    refused("base", "add", "foo", "~no-user-of-that-name/model", says="no such file")
    refused("gen", "alice", "a [V] face", "--device", "cpu:x", says="not available")
    assert hdb("gen", "alice", "x", "--size", 2**40).exit_code == 2
    assert "not UTF-8 text" in hdb("gen", "alice", "\udcff [V] face").stderr
    refused("inspect", "alice", "-o", tmp_path / "photo.jpg", says="not named .png")


@pytest.mark.parametrize(
    "error", [MemoryError(), torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("a bug")]
)
def test_memory_that_runs_out_is_a_line(
    error: Exception, alice: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object) -> None:
        raise error

    monkeypatch.setattr(store, "entries", fails)
    done = hdb("list")
    if "bug" in str(error):
        assert done.exception is error  # the control: bugs keep their traceback
    else:
        assert done.exit_code == 1 and done.stderr.startswith("error: out of memory; close")


def test_a_new_file_takes_the_place_of_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_links(*_: object) -> None:
        raise PermissionError("no links on this file system")

    for link in (os.link, no_links):
        monkeypatch.setattr(os, "link", link)
        path = tmp_path / f"{len(os.listdir(tmp_path))}.bin"
        with store.write_beside(path, new=True) as beside:  # the control: there is none
            beside.write_bytes(b"first")
        with (
            pytest.raises(HdbError, match="appeared while this ran"),
            store.write_beside(path, new=True) as beside,
        ):
            beside.write_bytes(b"second")
        assert path.read_bytes() == b"first"
        with store.write_beside(path) as beside:
            beside.write_bytes(b"third")
        assert path.read_bytes() == b"third" and not list(tmp_path.glob(".*"))


@pytest.mark.skipif(os.name != "posix", reason="permissions")
def test_files_have_the_permissions_of_files_here(tmp_path: Path) -> None:
    (tmp_path / "plain").write_bytes(b"x")
    with store.write_beside(tmp_path / "ours") as beside:
        beside.unlink()  # as a library does that writes a file of its own
        beside.write_bytes(b"x")
        beside.chmod(0o600)
    assert (tmp_path / "ours").stat().st_mode == (tmp_path / "plain").stat().st_mode
    for mode in (0o600, 0o440):
        (tmp_path / "ours").chmod(mode)
        with store.write_beside(tmp_path / "ours") as beside:
            assert not beside.stat().st_mode & 0o007  # not even for a moment
            beside.write_bytes(b"again")
        assert (tmp_path / "ours").stat().st_mode & 0o777 == mode


def test_pictures_of_two_runs_at_once_are_all_kept(tmp_path: Path) -> None:
    picture = Picture(np.zeros((8, 8, 3), np.uint8), "alice", "a [V] face", 1, "a [V] face")
    outputs = plan_outputs(tmp_path, ["alice-1"], grid=False)  # both plan before either writes

    def saved(outputs: Outputs) -> Path:
        kept = Album(outputs)
        kept.keep([picture])
        kept.keep([picture])  # again, as after running out of memory: saved once
        drawn = Drawn((picture,), DRAWN)
        return Path(kept.close(drawn)["pictures"][0]["path"])

    paths = [saved(outputs) for _ in range(2)]
    assert [path.name for path in paths] == ["alice-1.png", "alice-1-2.png"]
    named = plan_outputs(tmp_path / "alice-1.png", ["alice-1"], grid=False)
    assert saved(named) == paths[0]  # what was named itself is replaced
    assert len(list(tmp_path.iterdir())) == 2


def test_an_interrupt_keeps_the_pictures_that_were_drawn(
    alice: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, passes = backbone.StableDiffusion.sample, []

    def sample(self: Any, *args: Any) -> np.ndarray:
        if passes:
            raise KeyboardInterrupt
        passes.append(len(args[2]))
        return original(self, *args)

    monkeypatch.setattr(backbone.StableDiffusion, "sample", sample)
    monkeypatch.setattr("hdbcli.model.sample._at_once", lambda _: 2)
    words = "gen", "alice", "a [V] face", "-n", 4, "--steps", 1, "--seed", 1, "-o", tmp_path
    assert hdb(*words).exit_code == 130
    names = sorted(path.name for path in tmp_path.glob("*.png"))
    assert names == ["alice-a-v-face-1.png", "alice-a-v-face-2.png"]


def test_refining_neither_revives_nor_replaces_what_changed_meanwhile(
    alice: Path, astronaut: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = personalise.continue_refining

    def meanwhile(change: Callable[[], Any]) -> None:
        def refining(*args: Any) -> Any:
            change()
            return original(*args)

        monkeypatch.setattr(personalise, "continue_refining", refining)

    def little(_: Base, theta: Theta, __: Any, config: RefineConfig, *___: Any) -> Refined:
        return Refined(theta, torch.zeros(1), torch.zeros(1), config.optimizer)

    monkeypatch.setattr(personalise, "refine", little)
    words = "refine", "alice", astronaut, "--steps", 1, "--likeness", 0
    other = load(alice)
    meanwhile(lambda: save(other.saying(steps=99), alice))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    said = hdb(*words).stderr
    kept = next(tmp_path.glob("hdb-*/alice.safetensors"))  # the work is not lost
    assert "changed while" in said and str(kept) in said and load(alice).facts.steps == 99
    assert load(kept).facts.steps == other.facts.steps + 1
    meanwhile(lambda: None)
    assert hdb(*words).exit_code == 0 and load(alice).facts.steps == 100  # the control
    meanwhile(alice.unlink)
    assert "is gone" in hdb(*words).stderr and not alice.exists()


def test_an_identity_of_another_shape_is_refused(alice: Path, tmp_path: Path) -> None:
    identity = load(alice)
    few = replace(identity, down=identity.down[:3], up=identity.up[:3])
    narrow = replace(identity, down=identity.down[:, :, :10].contiguous())
    for name, odd in (("few", few), ("narrow", narrow)):
        file = tmp_path / f"{name}.safetensors"
        save(odd, file)
        for words in (
            ("import", file),
            ("gen", file, "a [V] face"),
            ("merge", file, "-o", tmp_path / "m"),
        ):
            refused(*words, says="its numbers are of")
        save(odd, store.path_of(name))
        assert "its numbers are of" in hdb("verify", name).stdout


@pytest.mark.parametrize(
    ("does", "makes", "rank"), [("shrink", "shrunk", 1), ("relax", "relaxed", 6)]
)
def test_replacing_in_place_refuses_a_file_that_changed_meanwhile(
    does: str, makes: str, rank: int, alice: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, other = getattr(derivation, makes), load(alice)
    words = does, "alice", "--rank", rank, *(["--yes"] * (does == "shrink"))

    def slow(*args: Any) -> Any:
        save(other.saying(steps=99), alice)  # another process refines while this one asks
        return original(*args)

    monkeypatch.setattr(derivation, makes, slow)
    assert "changed while" in hdb(*words).stderr and load(alice).facts.steps == 99
    monkeypatch.setattr(derivation, makes, original)
    assert hdb(*words).exit_code == 0 and load(alice).rank == rank


def test_renaming_replaces_no_file(alice: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original, bob = cli_store.new_path, alice.with_name("bob.safetensors")

    def slow(*args: Any) -> Path:
        path = original(*args)
        bob.write_bytes(b"another")  # between the look and the move
        return path

    monkeypatch.setattr(cli_store, "new_path", slow)
    said = hdb("mv", "alice", "bob").stderr
    assert "appeared while this ran" in said and said.count("\n") == 1
    assert alice.exists() and bob.read_bytes() == b"another"
    ok("mv", "alice", "bob", "--force")  # the control
    assert not alice.exists() and load(bob).facts.base == "tiny"


def test_what_is_taken_in_is_what_was_checked(
    alice: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from hdbcli.identity import verification

    file, check = tmp_path / "bob.safetensors", verification.fits_here
    file.write_bytes(alice.read_bytes())
    first = load(alice)
    other: Identity = replace(first, up=2 * first.up)

    def slow() -> Any:
        save(other, file)  # another process writes while the base is opened
        return check()

    monkeypatch.setattr(verification, "fits_here", slow)
    refused("import", file, says="changed while it was checked")
    monkeypatch.setattr(verification, "fits_here", check)
    ok("import", file)


def test_weights_too_large_to_hold_are_refused_and_large_ones_kept() -> None:
    generator = torch.Generator().manual_seed(0)
    down, up = torch.randn((1, 2, 1, 6), generator=generator), torch.randn((1, 2, 4, 1))
    theta = Theta(down, up)
    large = compose([theta], [1e20])
    size = (large.up @ large.down).double().norm() / (up @ down).double().norm()
    assert float(size) == pytest.approx(1e20, rel=1e-3)
    with pytest.raises(HdbError, match="1e\\+39"):
        compose([theta], [1e39])


def test_the_rate_follows_what_is_learned_from(
    astronaut: Path, alice: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rates: list[float] = []

    def refine(*args: Any) -> Any:
        rates.append(args[3].lr)
        raise KeyboardInterrupt

    monkeypatch.setattr(personalise, "refine", refine)
    for words in (
        ("new", astronaut, "bob"),
        ("new", astronaut, "bob", "--likeness", 0),
        ("refine", "alice", astronaut, "--likeness", 0),
    ):
        assert hdb(*words, *QUICK).exit_code == 130
    assert rates == [RefineConfig.lr, DIFFUSION_LR, DIFFUSION_LR]


def test_only_a_new_identity_starts_from_scratch(tiny: Base) -> None:
    bare = replace(tiny, spec=replace(tiny.spec, hypernetwork=None, likeness=0.0))
    new, on = (
        personalise.settle(bare, 3, 1, 0, "adamw", goes_on=goes_on) for goes_on in (False, True)
    )
    assert (new.lr, on.lr) == (UNPREDICTED_LR, DIFFUSION_LR)


def test_a_prompt_that_is_too_long_is_told(alice: Path, tmp_path: Path) -> None:
    words = "-n", 1, "--steps", 1, "-o", tmp_path
    long = "a portrait " * 20
    said = hdb("gen", "alice", f"{long}of a [V] face", *words).stderr
    assert "is cut off, and the person with it" in said and len(said.splitlines()) == 2  # the plan
    said = hdb("gen", "alice", f"a [V] face {long}", *words).stderr
    assert "portrait' is cut off" in said and "the person" not in said
    said = hdb("gen", "alice", "a [V] face", "--negative", long, *words).stderr
    assert "is cut off" in said
    assert "cut off" not in hdb("gen", "alice", "a portrait of a [V] face", *words).stderr
