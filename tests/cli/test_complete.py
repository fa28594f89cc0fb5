"""What the shell offers at the tab key: names and words, at once, in every shell."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
from commands import store_identity

from hdbcli.bench import suite
from hdbcli.cli import complete, measure
from hdbcli.config import METHOD_NAMES, SCHEDULERS
from registry.stable_diffusion import backbone

ROOT = Path(__file__).resolve().parents[2]
PROBE = """
import sys
sys.argv = ["hdb"]
from hdbcli.__main__ import main
try:
    main()
finally:
    sys.stderr.write(" ".join(sys.modules))
"""


def asked(line: str, shell: str = "fish") -> tuple[list[str], set[str]]:
    """Return what a shell is offered at the end of a line, and the modules that this took."""
    words = line.split(" ")
    asks = {"_HDB_COMPLETE": f"complete_{shell}", "_TYPER_COMPLETE_ARGS": line}
    asks |= {"_TYPER_COMPLETE_FISH_ACTION": "get-args"}
    if shell == "bash":
        asks |= {"COMP_WORDS": line, "COMP_CWORD": str(len(words) - 1)}
    done = subprocess.run(
        [sys.executable, "-c", PROBE],
        env={**os.environ, **asks},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    offered = done.stdout.splitlines()
    if shell == "zsh":  # _arguments '*: :(("one":"what it does"\n"two"))'
        offered = [each.split('"')[1] for each in offered]
    return offered, set(done.stderr.split())


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_names_and_words_are_offered_without_torch(shell: str, hdb_home: Path) -> None:
    for name in ("alice", "alina", "bob"):
        store_identity(name)
    for line, offers in (
        ("hdb gen al", ["alice", "alina"]),
        ("hdb show bo", ["bob"]),
        ("hdb base show t", ["tiny"]),
        ("hdb gen alice --scheduler eu", ["euler", "euler-a"]),
        ("hdb compos", ["compose"]),
    ):
        found, modules = asked(line, shell)
        assert [each.partition("\t")[0] for each in found] == offers, line
        assert "typer" in modules and not modules & {"torch", "diffusers", "numpy"}


def test_the_last_of_several_is_completed(hdb_home: Path) -> None:
    store_identity("alice")
    store_identity("bob")
    assert complete.identities("alice,b") == ["alice,bob"]
    assert complete.identities("x") == [] == complete.bases("x")
    assert complete.methods("lora,dream") == ["lora,dreambooth", "lora,dreambooth-all"]
    assert "lora" in METHOD_NAMES
    (hdb_home / "identities/alice.safetensors").unlink()
    (hdb_home / "identities/bob.safetensors").unlink()
    (hdb_home / "identities").rmdir()
    (hdb_home / "identities").write_text("no folder")  # a tab key tells no errors
    assert complete.identities("") == []


def test_words_are_those_that_commands_take() -> None:
    assert tuple(backbone.SCHEDULERS) == SCHEDULERS
    assert set(measure.BENCHMARKS) == set(suite.BENCHMARKS)


@pytest.mark.slow  # by the processor's time, which other work on the machine lengthens all the same
@pytest.mark.parametrize("line", ["hdb gen al", "hdb gen alice --base "])
def test_an_answer_takes_less_than_a_third_of_a_second(line: str, hdb_home: Path) -> None:
    store_identity("alice")

    def seconds() -> float:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert asked(line)[0]
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    assert min(seconds() for _ in range(5)) < 0.3
