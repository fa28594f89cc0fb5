"""Commands that must be instant load no torch, and little else."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

# Runs the console script's own function, then tells which top-level packages the process loaded.
PROBE = """
import sys
from hdbcli.cli.main import main
try:
    main()
except SystemExit as end:
    assert not end.code, end.code
print("LOADED", *sorted({name.partition(".")[0] for name in sys.modules}))
"""


def store_identity(name: str) -> None:
    """Write the smallest identity by hand, as this must work, and be read, without torch."""
    from registry.store import describe, path_of

    texts = "base family base_digest targets_digest basis_scheme basis_digest identifier optimizer"
    facts = dict.fromkeys(texts.split(), "x")
    facts |= dict.fromkeys(["version", "targets", "a", "b", "rank"], "1")
    facts |= {"kind": "identity", "content": "0" * 64, "dtype": "fp32", "hypernetwork": ""}
    facts |= {"basis_seed": "0", "steps": "0", "basis_probes": "[]", "lineage": "[]"}
    facts |= {"likeness": "null", "created": "2026-01-01T00:00:00+00:00"}
    number = {"dtype": "F32", "shape": [1, 1, 1]}
    header = {"__metadata__": {f"hdb.{key}": value for key, value in facts.items()}}
    header |= {"down": {**number, "data_offsets": [0, 4]}, "up": {**number, "data_offsets": [4, 8]}}
    text = json.dumps(header).encode()
    path = path_of(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(8))
    assert describe(path).facts, "the format has changed"


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


def test_light_commands_start_fast(
    hdb_home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A few times the processor's time that their two libraries take (`--help` 3.0 times, `list`
    of 1,000 identities 4.1 when this was written)."""
    # As after a first start: pip leaves the libraries compiled, and so does Python with hdb.
    monkeypatch.delenv("PYTHONDONTWRITEBYTECODE", raising=False)
    monkeypatch.setenv("PYTHONPYCACHEPREFIX", str(tmp_path / "compiled"))
    for number in range(1000):
        store_identity(f"person{number}")

    def seconds(*words: str) -> float:
        start = os.times()
        done = subprocess.run([sys.executable, *words], capture_output=True, timeout=60)
        assert done.returncode == 0, done.stderr
        assert words[-1] != "list" or done.stdout.count(b"person") == 1000
        end = os.times()  # what the processor worked: a busy machine does not lengthen that
        return end.children_user + end.children_system - start.children_user - start.children_system

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
    assert shown < 5 * libraries and listed < 6 * libraries, (libraries, shown, listed)
