"""Standard input and output as shells hand them over: closed, full, or of another encoding."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

HDB = [sys.executable, "-m", "hdbcli"]


def run(*words: str, **more: Any) -> subprocess.CompletedProcess[str]:
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.run(words, text=True, check=False, encoding="utf-8", **{**streams, **more})


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_json_is_json_in_any_encoding(encoding: str, tmp_path: Path) -> None:
    path = tmp_path / "caf\u00e9 \U0001f600" / "identities" / "bob.safetensors"
    path.parent.mkdir(parents=True)
    path.write_bytes(b"damaged")
    home = {"HDB_HOME": str(path.parents[1]), "PYTHONIOENCODING": encoding, "PYTHONUTF8": "1"}
    done = run(*HDB, "list", "--json", env={**os.environ, **home})
    assert done.returncode == 0, done.stderr
    assert [entry["path"] for entry in json.loads(done.stdout)["identities"]] == [str(path)]
    assert ("caf\u00e9" in done.stdout) == (encoding == "utf-8")  # which is left readable


@pytest.mark.parametrize("words", [["--version"], ["--help"], ["list", "--json"]])
def test_output_that_goes_nowhere_ends_plainly(words: list[str], hdb_home: Path) -> None:
    done = run(*HDB, *words)
    assert done.returncode == 0 and done.stdout and not done.stderr  # the control
    reader, writer = os.pipe()
    os.close(reader)
    done = run(*HDB, *words, stdout=writer)
    os.close(writer)
    assert (done.returncode, done.stderr) == (1, "")
    if os.path.exists("/dev/full"):
        with open("/dev/full", "w") as full:
            done = run(*HDB, *words, stdout=full)
        assert done.returncode == 1
        assert done.stderr.startswith("error: No space left") and done.stderr.count("\n") == 1


@pytest.mark.skipif(os.name != "posix", reason="a shell that closes streams")
def test_streams_that_are_closed(hdb_home: Path) -> None:
    identity = hdb_home / "identities" / "bob.safetensors"
    identity.parent.mkdir(parents=True)
    identity.write_bytes(b"damaged")
    done = run("sh", "-c", 'exec "$@" >&-', "sh", *HDB, "--version")
    assert (done.returncode, done.stderr) == (0, "")
    done = run("sh", "-c", 'exec "$@" <&-', "sh", *HDB, "rm", "bob")
    assert done.returncode == 1 and "pass --yes" in done.stderr and done.stderr.count("\n") == 1
    assert identity.exists()
    assert run("sh", "-c", 'exec "$@" 2>&-', "sh", *HDB, "rm", "bob").returncode == 1
