"""Commands that must be instant load no torch, and little else."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from commands import refused, store_identity

ROOT = Path(__file__).resolve().parents[2]

# Runs the console script's own function, then tells which top-level packages the process loaded.
PROBE = """
import sys
from hdbcli.__main__ import main
try:
    main()
except SystemExit as end:
    assert not end.code, end.code
print("LOADED", *sorted({name.partition(".")[0] for name in sys.modules}))
"""


@pytest.mark.parametrize("words", [["--help"], ["list"], ["--version"]], ids=" ".join)
def test_light_commands_load_no_torch(words: list[str], hdb_home: Path) -> None:
    store_identity("alice")
    done = subprocess.run(
        [sys.executable, "-c", PROBE, *words], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    loaded = set(done.stdout.rpartition("LOADED")[2].split())
    assert {"hdbcli", "typer"} <= loaded  # the probe sees what is loaded
    assert ("alice" in done.stdout) == (words == ["list"])
    assert not loaded & {"torch", "diffusers", "transformers", "accelerate", "bitsandbytes", "cv2"}


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["cp", "alice", "bob"], "bob.safetensors"),
        (["mv", "alice", "bob"], "alice is now bob"),
        (["rm", "alice", "--yes"], "deleted alice"),
    ],
    ids=lambda words: " ".join(words) if isinstance(words, list) else "",
)
def test_files_are_looked_after_without_torch(words: list[str], says: str, hdb_home: Path) -> None:
    path = hdb_home / "identities" / "alice.safetensors"
    store_identity("alice", whole=True)
    before = path.read_bytes()
    done = subprocess.run(
        [sys.executable, "-c", PROBE, *words], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert says in done.stdout
    assert not set(done.stdout.rpartition("LOADED")[2].split()) & {"torch", "diffusers"}
    kept = {p.stem: p.read_bytes() for p in path.parent.iterdir()}
    assert (
        kept == {"cp": {"alice": before, "bob": before}, "mv": {"bob": before}, "rm": {}}[words[0]]
    )


# Tells of a bar, when it is drawn, whether torch was loaded by then, and ends there unless it is
# to go on: what follows loads torch.
BARS = """
import os, sys
from rich.progress import Progress
from hdbcli.__main__ import main
add = Progress.add_task
def told(self, text, **more):
    print("BAR", text, "torch" in sys.modules, file=sys.stderr, flush=True)
    if os.environ["GO_ON"] == "no":
        os._exit(0)
    return add(self, text, **more)
Progress.add_task = told
try:
    main()
finally:
    print("END", "torch" in sys.modules, file=sys.stderr)
"""


@pytest.mark.parametrize(
    "words",
    [
        ["new", "face.png", "bob"],
        ["refine", "alice", "face.png"],
        ["gen", "alice", "a [V] face"],
        ["score", "alice"],
        ["merge", "alice", "--out", "m"],
    ],
    ids=lambda words: words[0],
)
def test_a_bar_is_drawn_before_torch_is_loaded(
    words: list[str], hdb_home: Path, tmp_path: Path, astronaut: Path
) -> None:
    store_identity("alice", whole=True)
    shutil.copy(astronaut, tmp_path / "face.png")

    def bars(go_on: str) -> list[str]:
        done = subprocess.run(
            [sys.executable, "-c", BARS, *words, "--base", "none"],
            cwd=tmp_path,
            env=os.environ | {"PYTHONPATH": str(ROOT), "GO_ON": go_on},
            capture_output=True,
            text=True,
        )
        assert done.returncode == (go_on == "yes"), done.stderr
        return [line for line in done.stderr.splitlines() if line.startswith(("BAR", "END"))]

    assert bars("no") == ["BAR starting False"]
    if words[0] == "score":  # the control: to find that there is no such base takes torch
        assert bars("yes") == ["BAR starting False", "END True"]


def test_only_the_command_that_is_asked_for_is_built() -> None:
    count = (
        "import sys, typer.main\n"
        "from hdbcli.__main__ import main\n"
        "read, seen = typer.main.get_params_from_function, []\n"
        "typer.main.get_params_from_function = lambda f: seen.append(f) or read(f)\n"
        "try:\n"
        "    main()\n"
        "finally:\n"
        "    print('READ', len(seen))\n"
    )

    def signatures(*words: str) -> int:
        done = subprocess.run(
            [sys.executable, "-c", count, *words], cwd=ROOT, capture_output=True, text=True
        )
        return int(done.stdout.rpartition("READ")[2])

    assert signatures("list") < 10 < 50 < signatures("--help")


def test_what_is_damaged_is_not_copied(hdb_home: Path) -> None:
    store_identity("alice")  # its digest is none
    refused("cp", "alice", "bob", says="digest does not agree")


def test_ctrl_c_while_the_command_line_is_imported_is_one_line() -> None:
    stop = (
        "import sys\n"
        "class Stop:\n"
        "    def find_spec(self, name, *_):\n"
        "        if name == 'hdbcli.cli.main': raise KeyboardInterrupt\n"
        "sys.meta_path.insert(0, Stop())\n"
        "from hdbcli.__main__ import main\n"
        "main()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", stop], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 130 and len(done.stderr.splitlines()) == 1, done.stderr
    assert "interrupted" in done.stderr


@pytest.mark.slow  # by the processor's time, which other work on the machine lengthens all the same
def test_light_commands_start_fast(
    hdb_home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two and a half times the processor's time that their two libraries take."""
    resource = pytest.importorskip("resource", reason="does not tell what other processes took")
    # As after a first start: pip leaves the libraries compiled, and so does Python with hdb.
    monkeypatch.delenv("PYTHONDONTWRITEBYTECODE", raising=False)
    monkeypatch.setenv("PYTHONPYCACHEPREFIX", str(tmp_path / "compiled"))
    for number in range(1000):
        store_identity(f"person{number}")

    def seconds(*words: str) -> float:
        start = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run([sys.executable, *words], capture_output=True, timeout=60)
        assert done.returncode == 0, done.stderr
        assert words[-1] != "list" or done.stdout.count(b"person") == 1000
        end = resource.getrusage(resource.RUSAGE_CHILDREN)  # a busy machine does not lengthen that
        return end.ru_utime + end.ru_stime - start.ru_utime - start.ru_stime

    # Turn by turn, the fastest of each: a busy machine slows all of them.
    runs = [
        (
            seconds("-c", "import typer, rich"),
            seconds("-m", "hdbcli", "--help"),
            seconds("-m", "hdbcli", "list"),
        )
        for _ in range(5)
    ]
    libraries, shown, listed = (min(column) for column in zip(*runs, strict=True))
    assert shown < 2.5 * libraries and listed < 2.5 * libraries, (libraries, shown, listed)
