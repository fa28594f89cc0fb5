"""Benchmarks: what a row promises, how time and memory are taken, and the command."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import pytest
from commands import refused, told

from hdbcli.errors import HdbError
from hdbcli.measuring import Row, measured, paired, scratch
from registry import store


def test_rows_keep_what_they_promise() -> None:
    assert Row("speed", 3.0, "x").kept is None
    assert Row("speed", 3.0, "x", below=3.0).kept and not Row("speed", 3.1, "x", below=3.0).kept
    assert Row("speed", 3.0, "x", above=3.0).kept and not Row("speed", 2.9, "x", above=3.0).kept


def test_commands_are_measured_with_their_own_memory() -> None:
    seconds, little = measured([sys.executable, "-c", "import time; time.sleep(0.3)"])
    _, much = measured([sys.executable, "-c", "x = bytearray(300_000_000)"])
    assert 0.3 < seconds < 30 and 3e8 < much < 6e8 and little < much / 2
    with pytest.raises(HdbError, match="no such thing"):
        measured([sys.executable, "-c", "raise SystemExit('no such thing')"])


def test_pairs_are_a_ratio() -> None:
    ratio = paired(lambda: time.sleep(0.06), lambda: time.sleep(0.02), rounds=3)
    assert 2 < ratio < 4


def test_scratch_goes_away_with_its_store(
    hdb_home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ZeroDivisionError), scratch() as folder:
        assert store.root().is_relative_to(folder) and folder.parent == tmp_path
        raise ZeroDivisionError
    assert not folder.exists() and store.root() == hdb_home


def test_bench_on_the_command_line(hdb_home: Path) -> None:
    refused("bench", "speed", says="choose from basis, people, bank, merge, sd15")
    result = told("bench", "basis")
    (row,) = result["rows"]
    assert "192 targets" in row["name"] and 0 < row["value"] < 20
    assert row["kept"] is (row["value"] <= row["below"]) and row["below"] == 2
    assert result["date"] > "2026" and "cores" in result["machine"]
