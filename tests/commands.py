"""Run hdb's commands in the test's own process, and say what they must answer."""

from __future__ import annotations

import json
from typing import Any

from typer.testing import CliRunner, Result

from hdbcli.cli.main import app
from registry import store

QUICK = ["--steps", "2"]


def hdb(*words: object) -> Result:
    return CliRunner().invoke(app, [str(word) for word in words])


def ok(*words: object) -> Result:
    result = hdb(*words)
    assert result.exit_code == 0, result.stderr
    return result


def told(*words: object) -> Any:
    """Run a command that must succeed; return its JSON document."""
    return json.loads(ok(*words, "--json").stdout)


def refused(*words: object, says: str) -> str:
    """Assert exit 1 and one line that says what, after the plan, and no change in the store; return
    what was said."""
    before, result = _kept(), hdb(*words)
    assert result.exit_code == 1, (result.exit_code, result.output)
    lines = [line for line in result.stderr.splitlines() if not line.startswith("memory: ")]
    assert len(lines) == 1 and lines[0].startswith("error: "), result.stderr
    assert says in result.stderr and not result.stdout, result.output
    assert _kept() == before
    return result.stderr


def _kept() -> dict[str, bytes]:
    return {str(p): p.read_bytes() for p in store.root().rglob("*") if p.is_file()}
