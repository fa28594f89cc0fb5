"""What is refused before any work: outputs in the way of other things, and options that would
do nothing."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from commands import hdb, ok, refused

from registry.errors import HdbError
from registry.plugins import load_registry


def test_a_training_replaces_hypernetworks_alone(alice: Path, tmp_path: Path) -> None:
    people, own = tmp_path / "missing", load_registry().get("tiny").hypernetwork
    people.mkdir()
    assert own is not None
    older, words = tmp_path / "older.safetensors", ("train", "hypernetwork", people, "-o")
    shutil.copy(own, older)
    photo, identity = tmp_path / "photo.jpg", tmp_path / "bob.safetensors"
    photo.write_bytes(b"a photo")
    shutil.copy(alice, identity)
    for file in (photo, identity):
        before = file.read_bytes()
        refused(*words, file, says="not a hypernetwork of hdb")
        assert file.read_bytes() == before
    refused(*words, older, "--from", older, says="is the input file")
    said = hdb(*words, older).stderr  # the control: an older hypernetwork may be replaced
    assert "not a hypernetwork of hdb" not in said and "missing" in said


def test_refining_says_first_that_it_cannot_write(
    alice: Path, astronaut: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, *_: Any) -> None:
        raise HdbError(f"cannot write {path}: no room")

    def work(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("hdbcli.training.personalise.crop_photos", work)
    assert (
        hdb("refine", "alice", astronaut).exit_code == 130
    )  # the control: work is what comes next
    monkeypatch.setattr("registry.files.write_beside", full)
    refused("refine", "alice", astronaut, says="no room")


def test_a_second_photo_is_no_name(
    hdb_home: Path, astronaut: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copy(astronaut, "b.png")
    shutil.copy(astronaut, "photo")
    for second in ("b.png", "photo", "B.JPG", tmp_path / "b.png"):
        refused("new", astronaut, second, says=f"more photos: --photo {second}")
    monkeypatch.chdir("/")
    ok("new", astronaut, "photo", "--no-refine")  # the control: nothing here has that name


def test_options_that_would_do_nothing_are_refused(
    alice: Path, astronaut: Path, tmp_path: Path
) -> None:
    for option in (("--seed", 0), ("--optimizer", "adamw"), ("--steps", 3)):
        refused("new", astronaut, "b", "--no-refine", *option, says=f"drop it or {option[0]}")
    compose = "compose", "alice", "--as", "b"
    for option in (("--device", "cpu"), ("--memory", "low")):
        refused(*compose, *option, says=f"add --show or drop {option[0]}")
    refused("new", astronaut, "b", "--targets", "all", says="no targets 'all'")
    refused("score", "alice", "--face", 1, says="add --photo or drop --face")
    train = "train", "hypernetwork", tmp_path, "-o", tmp_path / "h.safetensors"
    refused(*train, "--beta", 0, says="add --bank or drop --beta")
    refused(*train, "--held-out", 0, "--look", 5, says="drop it or --look")
    for shape in (("--iterations", 1), ("--no-recogniser",)):
        refused(*train, "--from", tmp_path / "old", *shape, says="has its shape already; drop it")
    for option in (("--bank", tmp_path, "--beta", 0), ("--look", 5), ("--held-out", 0)):
        said = hdb(*train, *option).stderr  # the control: they go on to what is wrong here
        assert "drop" not in said and "error: " in said
    refused("compare", astronaut, "--methods", "lora,lora:12", says="method lora comes twice")
    ok(*compose)  # the control


def test_what_a_training_lacks_is_told_before_the_photos(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("hdbcli.training.shards.list_people", read)
    out, gone = ("-o", tmp_path / "h.safetensors"), tmp_path / "gone.safetensors"
    train = "train", "hypernetwork", tmp_path, *out
    refused(*train, "--precision", "fp8", says="unknown precision 'fp8'; choose auto or fp32")
    refused(*train, "--optimizer", "sgd", says="unknown optimizer 'sgd'; choose adamw8bit")
    refused(*train, "--bank", tmp_path, says="holds no bank")
    refused(*train, "--from", gone, says=f"no hypernetwork at {gone}")
    bank = "train", "bank", tmp_path, "-o", tmp_path / "bank"
    refused(*bank, "--optimizer", "sgd", says="unknown optimizer 'sgd'")
    evaluate = "train", "evaluate", tmp_path
    refused(*evaluate, "--hypernetwork", gone, says=f"no hypernetwork at {gone}")
    (tmp_path / "photo.jpg").write_bytes(b"a photo")
    refused(*evaluate, "--hypernetwork", tmp_path / "photo.jpg", says="is not a hypernetwork")
    for words in (train, bank, evaluate):
        assert hdb(*words).exit_code == 130  # the control: photos come next
