"""What --json prints: the shapes that the page states, for success and failure, and exit codes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import typer.main
from commands import hdb, store_identity, told
from documents import FAILED, SHAPES, off

from hdbcli.cli.main import app
from registry import store
from registry.spec import BaseSpec, SampleSettings


def test_differences_are_seen() -> None:
    shape = {"a": "count", "b?": {"*": "number"}, "c": ["path?"]}
    assert off({"a": 1, "b": None, "c": []}, shape) == []
    assert off({"a": 1, "b": {"x": 0.5}, "c": ["/x", None]}, shape) == []
    for wrong in (
        {"a": 1.0, "b": None, "c": []},
        {"a": True, "b": None, "c": []},
        {"a": 1, "b": {"x": "y"}, "c": []},
        {"a": 1, "b": None, "c": ["x"]},
        {"a": 1, "b": None},
        {"a": 1, "b": None, "c": [], "d": 1},
    ):
        assert len(off(wrong, shape)) == 1, wrong


def test_every_command_has_json_and_its_shape_is_on_the_page() -> None:
    def leaves(command: Any, words: tuple[str, ...] = ()) -> list[str]:
        if not hasattr(command, "commands"):
            assert any("--json" in option.opts for option in command.params), words
            return [" ".join(words)]
        children = command.commands.items()
        return [leaf for name, child in children for leaf in leaves(child, (*words, name))]

    assert sorted(leaves(typer.main.get_command(app))) == sorted(SHAPES)


def test_documents_are_as_the_page_says(
    hdb_home: Path, astronaut: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(BaseSpec, "sampling", SampleSettings(steps=1))
    monkeypatch.chdir(tmp_path)
    said = {}
    for words in (
        ("new", astronaut, "alice", "--no-refine"),
        ("refine", "alice", astronaut, "--steps", 1, "--likeness", 0),
        ("gen", "alice", "a [V] face", "-n", 1, "--seed", 3, "--steps", 1, "--grid", "--html"),
        ("styles",),
        ("list",),
        ("show", "alice"),
        ("cp", "alice", "bob"),
        ("mv", "bob", "carol"),
        ("verify",),
        ("gc", "--dry-run"),
        ("merge", "alice", "-o", "merged"),
        ("export", "alice", "-o", "lora.safetensors"),
        ("import", store.folder() / "alice.safetensors", "dave"),
        ("inspect", "alice"),
        ("relax", "alice", "--rank", 3, "--as", "three"),
        ("shrink", "three", "--rank", 1, "--as", "one"),
        ("compose", "alice", "dave", "--as", "both"),
        ("rm", "carol", "-y"),
        ("base", "list"),
        ("base", "show", "tiny"),
        ("base", "default"),
        ("base", "set-hypernetwork", "tiny", "--reset"),
    ):
        name = " ".join(map(str, words[:2])) if words[0] == "base" else str(words[0])
        said[name] = document = told(*words)  # which compares it with the page
        assert document["seconds"]["total"] >= 0
    assert said["merge"]["path"] == said["merge"]["settings"]["out"] == str(tmp_path / "merged")
    settings = said["gen"]["settings"]
    assert settings["steps"] == 1 and settings["seed"] == 3 and settings["guidance"] == 3
    assert settings["base"] == "tiny" and settings["grid"] is True and "json" not in settings
    assert said["new"]["settings"]["photo"] == str(astronaut)
    assert said["new"]["settings"]["no-refine"] is True and said["new"]["seconds"]["predict"] > 0


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (("gen", "alice", "x", "--nonsense"), 2),
        (("gen", "alice"), 2),
        (("gen", "alice", "x", "--steps", "0"), 2),
        (("gen", "alice", "x", "--base", "tiny", "--memory", "lots"), 2),
        (("gen", "alice", "x", "--guidance", "nan"), 2),
        (("gen", "alice", "x", "-o", "x.jpg"), 2),
        (("gen", "alice", "x", "-o", "x.png"), 2),
        (("new", "photo.png", "a b"), 2),
        (("new", "photo.png", "other.png"), 2),
        (("new", "-"), 2),
        (("new", "https://example.org/a.png", "bob"), 2),
        (("new", "photo.png", "bob", "--optimizer", "sgd"), 2),
        (("new", "photo.png", "bob", "--no-refine", "--steps", "3"), 2),
        (("new", "photo.png", "bob", "--crop", "crop.jpg"), 2),
        (("compose", "alice=x", "--as", "bob"), 2),
        (("compose", "alice", "alice", "--as", "bob"), 2),
        (("compose", "alice", "--as", "bob", "-o", "x.png"), 2),
        (("merge", "alice", "-o", "x", "--format", "zip"), 2),
        (("merge", "alice", "-o", "x.ckpt"), 2),
        (("base", "set-hypernetwork", "tiny"), 2),
        (("compare", "x", "--methods", "magic"), 2),
        (("bench", "magic"), 2),
        (("show", "a/b"), 2),
        (("gen", "nobody", "x"), 1),
        (("gen", "alice", "--prompts", "none.txt"), 1),
        (("gen", "alice", "x", "--base", "none"), 1),
        (("new", "none.png", "bob"), 1),
        (("new", "photo.png", "alice"), 1),
        (("show", "none.safetensors"), 1),
        (("rm", "alice"), 1),
        (("base", "show", "none"), 1),
    ],
)
def test_like_mistakes_exit_alike_and_are_one_document(
    words: tuple[str, ...], code: int, hdb_home: Path
) -> None:
    store_identity("alice", whole=True)
    Path("photo.png").write_bytes(b"no photo")
    plain, done = hdb(*words), hdb(*words, "--json")
    assert plain.exit_code == done.exit_code == code, plain.stderr
    assert not plain.stdout and done.stderr == plain.stderr
    document = json.loads(done.stdout)
    assert off(document, FAILED) == [] and document["error"]["code"] == code
    assert document["error"]["message"] in plain.stderr


def test_a_bug_is_a_document_and_a_traceback(
    hdb_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails() -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr(store, "entries", fails)
    done = hdb("list", "--json")
    assert isinstance(done.exception, RuntimeError)
    assert json.loads(done.stdout)["error"] == {"code": 1, "message": "RuntimeError: a bug"}

    def interrupted() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(store, "entries", interrupted)
    done = hdb("list", "--json")
    assert done.exit_code == 130 and json.loads(done.stdout)["error"]["code"] == 130
