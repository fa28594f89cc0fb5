"""Run hdb's commands in the test's own process, and say what they must answer."""

from __future__ import annotations

import json
from typing import Any

from documents import match_page
from typer.testing import CliRunner, Result

from hdbcli.cli.main import app
from hdbcli.model.settings import Settings
from registry import store
from registry.checkpoints.safetensors import TensorInfo
from registry.identity_facts import content_digest

QUICK = ["--steps", "1"]
DRAWN = Settings(
    people=("alice",),
    prompt=("a [V] face",),
    count=1,
    seed=7,
    steps=2,
    guidance=3.0,
    negative="",
    strength=1.0,
    size=None,
    scheduler=None,
    loras=(),
    base="tiny",
)


def hdb(*words: object) -> Result:
    return CliRunner().invoke(app, [str(word) for word in words])


def ok(*words: object) -> Result:
    result = hdb(*words)
    assert result.exit_code == 0, (result.stderr, result.exception)
    return result


def told(*words: object) -> Any:
    """Run a command that must succeed; return its JSON document, which is as the page says."""
    document = json.loads(ok(*words, "--json").stdout)
    match_page(words, document)
    return document


def found(*words: object) -> Any:
    """Run it likewise; return what the command found, without its settings and seconds."""
    return {k: v for k, v in told(*words).items() if k not in ("settings", "seconds")}


def refused(*words: object, says: str) -> str:
    """Assert exit 1 or 2 and one line that says what, after the plan, and no change in the store;
    return what was said."""
    before, result = _kept(), hdb(*words)
    assert result.exit_code in (1, 2), (result.exit_code, result.output)
    lines = [line for line in result.stderr.splitlines() if not line.startswith("memory: ")]
    assert len(lines) == 1 and lines[0].startswith("error: "), result.stderr
    assert says in result.stderr and not result.stdout, result.output
    assert _kept() == before
    return result.stderr


def store_identity(name: str, whole: bool = False) -> None:
    """Write the smallest identity by hand, as this must work, and be read, without torch; `whole`
    with the right digest of its content."""
    texts = "base family base_digest targets_digest basis_scheme basis_digest identifier optimizer"
    facts = dict.fromkeys(texts.split(), "x")
    facts |= dict.fromkeys(["version", "targets", "a", "b", "rank"], "1")
    facts |= {"kind": "identity", "content": "0" * 64, "dtype": "fp32", "hypernetwork": ""}
    facts |= {"basis_seed": "0", "steps": "0", "basis_probes": "[]", "lineage": "[]"}
    facts |= {"likeness": "null", "created": "2026-01-01T00:00:00+00:00"}
    number = {"dtype": "F32", "shape": [1, 1, 1]}
    header: dict[str, Any] = {"__metadata__": {f"hdb.{key}": value for key, value in facts.items()}}
    header |= {"down": {**number, "data_offsets": [0, 4]}, "up": {**number, "data_offsets": [4, 8]}}
    if whole:
        metadata = header["__metadata__"]
        infos = {
            "down": TensorInfo("F32", (1, 1, 1), (0, 4)),
            "up": TensorInfo("F32", (1, 1, 1), (4, 8)),
        }
        metadata["hdb.content"] = content_digest(metadata, infos, bytes(8))
    text = json.dumps(header).encode()
    path = store.path_of(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(8))
    assert store.describe(path).facts, "the format has changed"


def _kept() -> dict[str, bytes]:
    return {str(p): p.read_bytes() for p in store.root().rglob("*") if p.is_file()}
