"""What is not typed: the settings of a picture that is drawn again, and a user's own defaults."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from commands import DRAWN, hdb, ok, refused, told
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from hdbcli import api, doctor
from hdbcli.config import user_file
from hdbcli.model.base import Base
from registry import store
from registry.errors import HdbError


def pixels(path: Path | str) -> np.ndarray:
    return np.asarray(Image.open(path))


ROUNDING = 2  # levels: drawn alone or with others, some CPUs add up in another order


def far(one: Path | str, other: Path | str) -> int:
    """Return how many levels the pixel differs that differs most."""
    return int(np.abs(pixels(one).astype(int) - pixels(other)).max())


def config(text: str) -> None:
    user_file().parent.mkdir(parents=True, exist_ok=True)
    user_file().write_text(text, encoding="utf-8")


def saying(path: Path, text: str) -> Path:
    info = PngInfo()
    info.add_text("hdb", text)
    Image.new("RGB", (8, 8)).save(path, pnginfo=info)
    return path


def test_a_picture_is_drawn_again_with_its_own_settings(
    alice: Path, tiny: Base, tmp_path: Path
) -> None:
    shutil.copy(alice, store.path_of("bob"))
    words = "--steps", 3, "--guidance", 2, "--negative", "bark", "--strength", 0.7, "--seed", 5
    alone = (*words[:-2], "--scheduler", "euler", "--size", 64, "-n", 1)
    words = (*words, "--scheduler", "euler", "--size", 64, "-n", 2, "--grid", "-o", tmp_path)
    made = told("gen", "alice", "a [V] face", "A [V] face with bark skin", *words)
    first, second = (Path(made["pictures"][i]["path"]) for i in (0, 3))
    ok("gen", "--from", second, "-o", "again.png")
    assert far("again.png", second) <= ROUNDING < far(first, second)
    told("gen", "alice", "A [V] face with bark skin", *alone, "--seed", 6, "-o", "alone.png")
    assert (pixels("again.png") == pixels("alone.png")).all()
    assert Image.open("again.png").text == Image.open(second).text
    ok("gen", "--from", second, "-o", "other.png", "--strength", 0.1)
    changed = json.loads(Image.open("other.png").text["hdb"])
    assert (pixels("other.png") != pixels(second)).any() and changed["strength"] == 0.1
    assert {**changed, "strength": 0.7} == json.loads(Image.open(second).text["hdb"])
    all_again = told("gen", "--from", made["grid"], "-o", "all", "--grid")
    assert (pixels(all_again["grid"]) == pixels(made["grid"])).all()
    assert len(all_again["pictures"]) == 4
    Path("prompts.txt").write_text("A [V] face with bark skin")
    more = "--prompts", "prompts.txt", "--seed", 6, "-o", "third.png"
    ok("gen", "--from", first, "bob", *more)
    assert (pixels("third.png") == pixels("alone.png")).all()  # bob is alice
    settings = api.read_settings(second)
    assert settings.people == ("alice",) and settings.size == 64 and settings.seed == 6
    (drawn,) = api.generate(**{**vars(settings), "base": tiny}).pictures
    assert abs(drawn.image.astype(int) - pixels(second)).max() <= 1


def test_what_does_not_say_how_it_was_drawn_is_refused(alice: Path, tmp_path: Path) -> None:
    (tmp_path / "text.png").write_text("text")
    Image.new("RGB", (8, 8)).save(tmp_path / "plain.png")
    for name, says in (
        ("text", "is not a picture"),
        ("plain", "does not say how it was drawn"),
        ("none", "no such file"),
    ):
        refused("gen", "--from", tmp_path / f"{name}.png", says=says)
    good = json.loads(DRAWN.text())
    assert api.read_settings(saying(tmp_path / "good.png", DRAWN.text())) == DRAWN
    for wrong in (
        {**good, "seed": "1"},
        {**good, "count": True},
        {**good, "people": "alice"},
        {**good, "prompt": [1]},
        {**good, "guidance": None},
        {key: value for key, value in good.items() if key != "base"},
        [good],
        3,
    ):
        with pytest.raises(HdbError, match="is damaged"):
            api.read_settings(saying(tmp_path / "bad.png", json.dumps(wrong)))
    with pytest.raises(HdbError, match="is damaged"):
        api.read_settings(saying(tmp_path / "bad.png", "{" * 100_000))
    gone = replace(DRAWN, people=("nobody",))
    refused("gen", "--from", saying(tmp_path / "x.png", gone.text()), says="'nobody'")
    far = replace(DRAWN, steps=10**6)
    result = hdb("gen", "--from", saying(tmp_path / "x.png", far.text()))
    assert result.exit_code == 2 and "1000000 is not in the range" in result.stderr
    lora = replace(DRAWN, loras=("style.safetensors=0.5",))
    refused("gen", "--from", saying(tmp_path / "x.png", lora.text()), says="style.safetensors")
    (tmp_path / "style.safetensors").write_bytes(b"x")  # beside the picture it is found, and read
    refused("gen", "--from", tmp_path / "x.png", says=f"{tmp_path / 'style.safetensors'}")


def test_own_defaults_hold_until_the_command_line_says_otherwise(alice: Path) -> None:
    config('device = "cpu"\n[gen]\nsteps = 2\ncount = 1\nscheduler = "euler"\nguidance = 2\n')
    made = told("gen", "alice", "a [V] face")
    (picture,) = made["pictures"]
    settings = api.read_settings(Path(picture["path"]))
    assert (settings.steps, settings.scheduler, settings.guidance) == (2, "euler", 2)
    made = told("gen", "alice", "a [V] face", "--steps", 1, "-n", 2)
    assert len(made["pictures"]) == 2
    assert api.read_settings(Path(made["pictures"][0]["path"])).steps == 1
    again = told("gen", "--from", picture["path"], "--guidance", 3)["pictures"]
    assert api.read_settings(Path(again[0]["path"])) == replace(settings, guidance=3)
    config('[train]\nlr = 0.5\n[base.add]\nrevision = "main"\n')
    assert "default: 0.5" in " ".join(ok("train", "bank", "--help").stdout.split())
    assert "default: main" in " ".join(ok("base", "add", "--help").stdout.split())
    config("[new]\nsteps = 9")  # a default is not given, so it does not contradict
    refused("new", "no.png", "bob", "--no-refine", says="no.png")
    refused("new", "no.png", "bob", "--no-refine", "--steps", 9, says="drop it or --steps")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[gen]\nstep = 2", "[gen] no option is called 'step'"),
        ("[gne]\nsteps = 2", "no command is called 'gne'"),
        ("devce = 2", "no option is called 'devce'"),
        ("[train]\nrevision = 2", "[train] no option is called 'revision'"),
        ("[train.bnak]\nsteps = 2", "[train] no command is called 'bnak'"),
        ("[gen]\nyes = true", "[gen] no option is called 'yes'"),
        ("[rm]\nnames = ['alice']", "[rm] no option is called 'names'"),
        ("[gen]\nsteps = 5000", "[gen] steps cannot be 5000"),
        ("[gen]\nsteps = true", "[gen] steps cannot be True"),
        ("[gen]\ngrid = 1", "[gen] grid cannot be 1"),
        ("[gen]\nlora = 'x'", "[gen] lora cannot be 'x'"),
        ("steps = 'x'", "steps cannot be 'x'"),
        ("[gen", "cannot be read"),
        ("gen = [1, {", "cannot be read"),
    ],
)
def test_a_wrong_key_or_value_is_named(text: str, says: str, hdb_home: Path) -> None:
    config("")
    ok("list")  # the control
    config(text)
    assert str(user_file()) in refused("list", says=says)


def test_doctor_shows_own_defaults(hdb_home: Path) -> None:
    assert "none of the user" in doctor.the_defaults().found
    config("memory = 'low'\n[gen]\nsteps = 20\n")
    check = doctor.the_defaults()
    assert check.facts["values"] == ["memory = low", "gen.steps = 20"] and check.state == doctor.OK
    assert check.facts["path"] == str(user_file()) in check.found
    config("[")
    assert doctor.the_defaults().state == doctor.WARNING


def test_the_file_lies_with_other_settings_of_the_user(monkeypatch: pytest.MonkeyPatch) -> None:
    assert user_file() == store.root() / "config.toml"
    monkeypatch.delenv("HDB_HOME")
    monkeypatch.setenv("XDG_CONFIG_HOME", "/somewhere")
    assert user_file().name == "config.toml" and user_file().parent.name == "hdb"
