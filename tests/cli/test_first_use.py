"""What a new user meets: tables without Python, names that commands take, lines instead of long
waits for the wrong thing."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from commands import hdb, ok, refused, store_identity

from hdbcli.cli import render
from hdbcli.interop.merged_files import check_folder
from hdbcli.model.base import Base
from hdbcli.model.sample import doubts, strange_words
from registry import store
from registry.bases.settings import Added, Settings, write_settings
from registry.errors import HdbError
from registry.plugins import load_registry
from registry.spec import SampleSettings
from registry.tiny import WEIGHTS


def test_tables_have_no_python_in_them(capsys: pytest.CaptureFixture[str]) -> None:
    values = {"bytes": 1234567, "numbers": 5000, "basis_seed": 20230713, "none": None}
    values |= {"many": ["a", "b"], "empty": [], "deep": {"unet": ["x", "y"], "n": 2}, "is": True}
    render.facts(values)
    lines = dict(line.split(None, 1) for line in capsys.readouterr().out.splitlines())
    assert lines == {
        "bytes": "1,234,567 bytes",
        "numbers": "5,000",
        "basis_seed": "20230713",
        "none": "-",
        "many": "a, b",
        "empty": "-",
        "deep": "unet: x, y; n: 2",
        "is": "yes",
    }
    text = ok("base", "show", "tiny").stdout
    assert "unet: .*" in text and not any(sign in text for sign in ("['", "('", "{", "None"))


def test_quiet_list_names_what_commands_take(hdb_home: Path) -> None:
    store_identity("alice")
    bad = store.path_of("alice").with_name("not a name!.safetensors")
    bad.write_bytes(store.path_of("alice").read_bytes())
    assert ok("list", "-q").stdout.split() == ["alice"]
    assert "rename the file" in ok("list").stdout  # the control: the table tells of it


def test_an_empty_name_is_refused(hdb_home: Path, astronaut: Path) -> None:
    refused("new", astronaut, "", says="'' is not a valid name")
    store_identity("alice", whole=True)
    refused("import", store.path_of("alice"), "", says="'' is not a valid name")


def test_a_file_of_another_kind_is_no_folder(tmp_path: Path) -> None:
    for name in ("m.ckpt", "m.PT", "m.bin"):
        with pytest.raises(HdbError, match=f"{name} is named like a file"):
            check_folder(tmp_path / name, False)
    check_folder(tmp_path / "v1.5", False)  # the control
    (tmp_path / "m.ckpt").mkdir()
    check_folder(tmp_path / "m.ckpt", False)  # a folder that is there


def test_results_are_not_called_what_they_are_not(alice: Path, tmp_path: Path) -> None:
    for name in ("page.html", "m.CKPT", "sheet.pdf"):
        refused("gen", "alice", "a [V] face", "-o", tmp_path / name, says=f"{name} is named like")
        refused("compare", tmp_path, "-o", tmp_path / name, says=f"{name} is named like a file")
    for name in ("l.ckpt", "l.PT", "l.bin"):
        refused("export", "alice", "-o", tmp_path / name, says=f"{name} is not named .safetensors")
        train = "train", "hypernetwork", tmp_path, "-o", tmp_path / name
        refused(*train, says=f"{name} is not named .safetensors")
    assert {path.name for path in tmp_path.iterdir()} == {"hdb-home"}
    ok("export", "alice", "-o", tmp_path / "l.v1.5.safetensors")  # the control
    ok("gen", "alice", "a [V] face", "-n", 1, "--steps", 1, "-o", tmp_path / "v1.5")


def test_the_name_of_a_file_is_no_prompt(alice: Path, tmp_path: Path) -> None:
    words = "gen", "alice", "-n", 1, "--steps", 1, "-o", tmp_path / "drawn"
    for name in ("page.html", "drawn/Prompts.TXT", "photo.jpg"):
        refused(*words, "a [V] face", "--html", name, says=f"'{name}' is named like a file")
    assert not (tmp_path / "drawn").exists()
    ok(*words, "a poster of v.html by [V]")  # the control


def test_forgetting_a_base_names_who_needs_it(hdb_home: Path, tmp_path: Path) -> None:
    def add(name: str) -> None:
        added = Added(name, str(tmp_path), "sd1", "epsilon", 512, "", {}, "org/model@0123")
        write_settings(name, Settings(added=added))

    store_identity("alice")  # on base x
    for name in ("X", "other"):
        add(name)
    said = hdb("base", "rm", "x").stderr
    assert "alice" in said and "hdb base add X org/model" in said
    assert not hdb("base", "rm", "other").stderr


def test_a_wrong_hypernetwork_is_told_before_the_base_is_loaded(
    hdb_home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(*_: object, **__: object) -> None:
        raise AssertionError("the base was loaded")

    monkeypatch.setattr("hdbcli.model.base.load_base", load)
    give = ("base", "set-hypernetwork", "tiny")
    refused(*give, tmp_path / "none.safetensors", says="no such file")
    unet = WEIGHTS / "unet" / "diffusion_pytorch_model.safetensors"
    refused(*give, unet, says="is not a hypernetwork")
    result = hdb(*give, WEIGHTS / "hypernetwork.safetensors")
    assert isinstance(result.exception, AssertionError)  # the control


def test_settings_far_from_sense_get_a_line() -> None:
    spec = load_registry().get("tiny")
    usual = spec.sampling
    assert doubts(spec, usual, 1.0) == doubts(spec, SampleSettings(25, 7.5, size=192), -1.0) == []
    odd = doubts(spec, SampleSettings(25, 100.0, size=1024), 1e9)
    assert [line.split()[1] for line in odd] == ["--strength", "--guidance", "--size"]
    assert "128 px" in odd[2] and "1e+09" in odd[0]
    unwanted = SampleSettings(8, 1.0, negative="hat")
    assert "counts nothing at --guidance 1" in doubts(spec, unwanted, 1.0)[0]
    assert doubts(spec, replace(unwanted, guidance=2.0), 1.0) == []


def test_words_that_a_base_was_never_taught_get_a_line(tiny: Base) -> None:
    captions = tiny.spec.captions
    assert strange_words(tiny, captions) == "" == strange_words(tiny, ["a [V] FACE,", ""])
    said = strange_words(tiny, ["a [V] face riding a dragon", "Dragon, bark skin"])
    assert said == "hint: tiny was never taught 'riding', 'dragon'; hdb styles lists what it draws"
    assert "and 3 more" in strange_words(tiny, ["zero two three four five six seven eight"])
    anything = replace(tiny, spec=replace(tiny.spec, captions=()))  # draws what is described
    assert strange_words(anything, ["a [V] face riding a dragon"]) == ""
