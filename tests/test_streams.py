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
    assert [entry["path"] for entry in json.loads(done.stdout)] == [str(path)]
    assert ("caf\u00e9" in done.stdout) == (encoding == "utf-8")  # which is left readable
