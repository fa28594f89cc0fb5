"""Every command end to end on the shipped base, and what bad input gets: one line, exit 1,
nothing written."""

from __future__ import annotations

import json
import shutil
import struct
import subprocess
import sys
import zlib
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from commands import QUICK, hdb, ok, refused, told
from identities import TINY
from PIL import Image
from typer.testing import CliRunner

from hdbcli import api
from hdbcli.cli import main
from hdbcli.cli.outputs import plan_outputs
from hdbcli.config import PORTRAIT
from registry import store
from registry.bases.settings import customised, settings_path
from registry.errors import HdbError
from registry.plugins import load_registry
from registry.spec import BaseSpec, SampleSettings
from registry.tiny import CAPTIONS


def test_new_json(hdb_home: Path, astronaut: Path) -> None:
    # The diffusion loss need not fall where portraits have a say.
    words = "--json", "--steps", 5, "--likeness", 0
    values = json.loads(ok("new", astronaut, *words).stdout)
    targets, a, b = TINY
    assert values["name"] == "astronaut" and values["base"] == "tiny" and values["rank"] == 4
    assert values["numbers"] == targets * (a + b) * 4
    path = Path(values["path"])
    assert path.stat().st_size == values["bytes"] <= 120_000
    assert values["loss"]["end"] < values["loss"]["start"]
    assert set(values["seconds"]) == {"crop", "predict", "refine", "total"}
    assert 0 <= values["likeness"] <= 1
    assert [p.name for p in path.parent.iterdir()] == ["astronaut.safetensors"]


def test_same_photo_and_seed_give_identical_tensors(hdb_home: Path, astronaut: Path) -> None:
    from hdbcli.identity.file import load

    thetas = []
    for name, seed in (("one", 0), ("two", 0), ("three", 1)):
        ok("new", astronaut, name, "--seed", seed, "--likeness", 0, *QUICK)
        identity = load(store.path_of(name))
        thetas.append((identity.down, identity.up))
    assert all((a == b).all() for a, b in zip(thetas[0], thetas[1], strict=True))
    assert not (thetas[0][1] == thetas[2][1]).all()


def test_new_without_refining_and_with_more_photos(hdb_home: Path, astronaut: Path) -> None:
    values = json.loads(ok("new", astronaut, "raw", "--no-refine", "--json").stdout)
    assert values["rank"] == 1 and values["loss"]["start"] == values["loss"]["end"]
    two = ok("new", astronaut, "two", "--photo", astronaut, "--json", *QUICK)
    assert json.loads(two.stdout)["rank"] == 4
    for option, value in (("--rank", 2), ("--steps", 4), ("--likeness", 0)):
        refused("new", astronaut, "no", "--no-refine", option, value, says=f"it or {option}")


def test_consent_is_asked_for_every_person_whose_photo_can_be_used(
    alice: Path, astronaut: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def new(photo: Path, answer: str, *more: str) -> tuple[int, bool]:
        """Return the exit code, and whether a question was asked."""
        words = ["new", str(photo), "bob", "--no-refine", *more]
        done = CliRunner().invoke(main.app, words, input=answer)
        return done.exit_code, "Does this person agree?" in done.stderr

    def work(*_: object) -> None:
        raise KeyboardInterrupt

    empty = tmp_path / "empty.png"
    Image.new("RGB", (128, 128)).save(empty)
    monkeypatch.setattr("hdbcli.training.personalise.create", work)
    assert new(astronaut, "") == (130, False)  # there is no terminal to ask at
    terminal = SimpleNamespace(stdin=SimpleNamespace(isatty=lambda: True))
    monkeypatch.setattr(main, "sys", terminal)
    assert new(empty, "y\n") == (1, False)
    assert new(astronaut, "n\n") == (1, True) == new(astronaut, "")
    assert new(astronaut, "y\n") == (130, True)
    assert new(astronaut, "", "--yes") == (130, False)
    assert store.names() == ["alice"]


def test_refine_goes_on(alice: Path, astronaut: Path) -> None:
    before = json.loads(ok("show", "alice", "--json").stdout)
    values = json.loads(ok("refine", "alice", astronaut, "--rank", 6, "--json", *QUICK).stdout)
    after = json.loads(ok("show", "alice", "--json").stdout)
    assert values["rank"] == 6 and after["steps"] == before["steps"] + 1
    assert "relaxed from rank 4 to 6" in after["lineage"]
    refused("refine", "alice", astronaut, "--rank", 2, says="rank 6 to 2")


def test_gen_is_repeatable_and_named_by_prompt_and_seed(alice: Path, tmp_path: Path) -> None:
    prompt = "a Pixar character of a [V] face"
    arguments = ["gen", "alice", prompt, "-n", 2, "--seed", 7, "--steps", 3, "-o"]
    first = ok(*arguments, tmp_path / "a")
    assert "seed 7" in first.stdout and "[V]" not in first.stderr
    ok(*arguments, tmp_path / "b")
    ok(*arguments, tmp_path / "c", "--strength", 0)
    names = [f"alice-a-pixar-character-of-a-v-face-{seed}.png" for seed in (7, 8)]
    for name in names:
        a, b, c = (np.asarray(Image.open(tmp_path / d / name)) for d in "abc")
        assert (a == b).all() and not (a == c).all()
    text = Image.open(tmp_path / "a" / names[1]).text["parameters"]
    assert text.startswith(prompt + "\n") and "Seed: 8" in text and "Steps: 3" in text
    ok(*arguments, tmp_path / "a")  # nothing is overwritten
    assert len(list((tmp_path / "a").iterdir())) == 4


def test_gen_batch_does_not_change_a_seed(alice: Path, tmp_path: Path) -> None:
    ok("gen", "alice", "a [V] face", "-n", 3, "--seed", 1, "--steps", 3, "-o", tmp_path)
    ok("gen", "alice", "a [V] face", "-n", 1, "--seed", 3, "--steps", 3, "-o", tmp_path / "x.png")
    a, b = (
        np.asarray(Image.open(tmp_path / n)).astype(int) for n in ("alice-a-v-face-3.png", "x.png")
    )
    assert abs(a - b).max() <= 1


def test_gen_of_several_people_is_each_alone(alice: Path, astronaut: Path, tmp_path: Path) -> None:
    ok("new", astronaut, "bob", "--no-refine")  # rank 1 beside alice's 4
    words = ["a [V] face", "-n", 2, "--seed", 5, "--steps", 3]
    result = ok("gen", "alice,bob", *words, "--grid", "-o", tmp_path / "both", "--json")
    values = json.loads(result.stdout)
    assert [(p["name"], p["seed"]) for p in values["pictures"]] == [
        *(("alice", 5), ("alice", 6), ("bob", 5), ("bob", 6))
    ]
    rows = np.asarray(Image.open(values["grid"]))  # a row each, with captions below
    assert rows.shape[1] == 256
    pictures = {}
    for name in ("alice", "bob"):
        ok("gen", name, *words, "-o", tmp_path / "alone")
        for seed in (5, 6):
            together, alone = (
                np.asarray(Image.open(tmp_path / d / f"{name}-a-v-face-{seed}.png")).astype(int)
                for d in ("both", "alone")
            )
            assert abs(together - alone).max() <= 1
            top, left = len(rows) // 2 * (name == "bob"), 128 * (seed - 5)
            assert (rows[top : top + 128, left : left + 128] == together).all()
            pictures[name, seed] = alone
    assert abs(pictures["alice", 5] - pictures["bob", 5]).max() > 1  # they are not the same person
    refused("gen", "alice,missing", "x", says="unknown identity 'missing'")
    for words in (("--steps", 1001), ("--seed", 2**64)):
        result = hdb("gen", "alice", "x", *words)
        assert result.exit_code == 2 and "is not in the range" in result.stderr


def test_gen_json_grid_file_and_hint(alice: Path, tmp_path: Path) -> None:
    sheet = tmp_path / "sheet.png"
    words = ["-n", 2, "--steps", 2, "--grid", "-o", sheet, "--json"]
    result = ok("gen", alice, "a face", *words)
    values = json.loads(result.stdout)
    assert values["grid"] == str(sheet) and Image.open(sheet).width == 256
    assert "[V]" in result.stderr
    assert values["pictures"][1]["seed"] == values["pictures"][0]["seed"] + 1
    refused("gen", "alice", "x", "-o", tmp_path / "one.png", says="4 pictures")


def test_gen_schedulers_negative_and_size(alice: Path, tmp_path: Path) -> None:
    base = ["gen", "alice", "a [V] face", "-n", 1, "--seed", 1, "--steps", 3, "-o"]
    ok(*base, tmp_path / "a.png")
    ok(*base, tmp_path / "b.png", "--scheduler", "euler-a")
    ok(*base, tmp_path / "c.png", "--negative", "bark skin", "--guidance", 6)
    ok(*base, tmp_path / "d.png", "--size", 192)
    ok(*base, tmp_path / "g.png", "--guidance", 6)
    ok(*base, tmp_path / "h.png", "--guidance", told("base", "show", "tiny")["guidance"])
    a, b, c, d, g, h = (np.asarray(Image.open(tmp_path / f"{x}.png")) for x in "abcdgh")
    assert (
        not any((a == other).all() for other in (b, g))
        and not (c == g).all()
        and d.shape == (192, 192, 3)
    )
    assert (a == h).all() and "CFG scale: 1.0" in Image.open(tmp_path / "a.png").text["parameters"]
    refused(*base, tmp_path / "e.png", "--scheduler", "nope", says="ddim, dpm++")
    refused(*base, tmp_path / "e.png", "--size", 65, says="multiple of 32")


def test_list_show_rm(alice: Path) -> None:
    (entry,) = told("list")["identities"]
    assert {"name", "base", "bytes", "rank", "created", "path"} <= set(entry)
    assert entry["name"] == "alice" and entry["path"] == str(alice)
    assert ok("list", "-q").stdout == "alice\n" and "alice" in ok("list").stdout
    assert json.loads(ok("show", "alice", "--json").stdout)["base"] == "tiny"
    assert "tiny" in ok("show", alice).stdout
    refused("rm", "alice", says="--yes")
    ok("rm", "alice", "--yes")
    assert not alice.exists() and told("list")["identities"] == []
    refused("rm", "alice", "-y", says="unknown identity")


def test_set_hypernetwork(hdb_home: Path, tmp_path: Path) -> None:
    own = load_registry().get("tiny").hypernetwork
    assert own is not None
    other = tmp_path / "h.safetensors"
    shutil.copy(own, other)
    (tmp_path / "bad.safetensors").write_bytes(b"half")
    set_to = ("base", "set-hypernetwork", "tiny")
    refused(*set_to, tmp_path / "bad.safetensors", says="not a safetensors file")
    refused(*set_to, says="either the file")
    ok(*set_to, other)
    assert customised(load_registry().get("tiny")).hypernetwork == other
    assert json.loads(ok("base", "show", "tiny", "--json").stdout)["hypernetwork"] is True
    other.unlink()  # the setting is followed, so this is now seen
    assert json.loads(ok("base", "show", "tiny", "--json").stdout)["hypernetwork"] is False
    settings_path("tiny").write_text("[]")
    refused("base", "show", "tiny", says="delete it")
    ok(*set_to, "--reset")
    assert customised(load_registry().get("tiny")).hypernetwork == own


def test_base_commands_and_version() -> None:
    assert "tiny" in [b["name"] for b in told("base", "list")["bases"]]
    assert json.loads(ok("base", "show", "tiny", "--json").stdout)["hypernetwork"] is True
    assert "128" in ok("base", "list").stdout and "sks" in ok("base", "show", "tiny").stdout
    assert ok("--version").stdout == "hdb 0.1.0\n"
    refused("base", "show", "tinny", says="tiny")


def png_header(width: int, height: int) -> bytes:
    """Return a PNG that claims a size and holds no pixels."""
    body = struct.pack(">2I5B", width, height, 8, 2, 0, 0, 0)

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    pixels = zlib.compress(b"\0" * 1000)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", body) + chunk(b"IDAT", pixels)


def test_bad_photos(hdb_home: Path, tmp_path: Path, astronaut: Path) -> None:
    whole = astronaut.read_bytes()
    bad = {
        "text.jpg": (b"hello", "no JPEG"),
        "empty.png": (b"", "empty"),
        "cut.png": (whole[: len(whole) // 3], "damaged"),
        "bomb.png": (png_header(60_000, 60_000), "megapixels"),
    }
    for name, (data, says) in bad.items():
        (tmp_path / name).write_bytes(data)
        refused("new", tmp_path / name, says=says)
    Image.new("RGB", (300, 300), (90, 120, 200)).save(tmp_path / "sky.png")
    refused("new", tmp_path / "sky.png", says="no face")
    refused("new", tmp_path / "missing.png", says="no such file")
    refused("new", tmp_path, says="not a file")


def test_several_faces_need_a_number(hdb_home: Path, tmp_path: Path, astronaut: Path) -> None:
    face = Image.open(astronaut).convert("RGB").crop((100, 0, 400, 300))
    pair = Image.new("RGB", (600, 300))
    pair.paste(face, (0, 0)), pair.paste(face, (300, 0))
    pair.save(tmp_path / "pair.png")
    refused("new", tmp_path / "pair.png", says="--face N")
    refused("new", tmp_path / "pair.png", "--face", 3, says="2 faces, not 3")
    ok("new", tmp_path / "pair.png", "--face", 2, "--no-refine")
    words = "--photo", tmp_path / "pair.png", "--no-refine", "--face"
    refused("new", astronaut, "solo", *words, 3, says="2 faces, not 3")
    ok("new", astronaut, "solo", *words, 2)  # which is asked of the pair alone
    refused("new", astronaut, "alone", "--face", 2, says="1 face, not 2")


@pytest.mark.parametrize("name", ["a/b", "..", "a\0b", "a\nb", "con", "NUL.txt", "x" * 65, "a."])
def test_bad_names(name: str, hdb_home: Path, astronaut: Path) -> None:
    refused("new", astronaut, name, says="name")


def test_bad_identities(alice: Path, astronaut: Path, tmp_path: Path) -> None:
    refused("new", astronaut, "Alice", says="exists")  # names differ in more than case
    refused("gen", "alise", "x", says="'alice'")
    data = bytearray(alice.read_bytes())
    data[-1] ^= 1
    edited = tmp_path / "edited.safetensors"
    edited.write_bytes(data)
    refused("gen", edited, "x", says="edited")
    (tmp_path / "half.safetensors").write_bytes(data[:5000])
    refused("gen", tmp_path / "half.safetensors", "x", says="half.safetensors")
    refused("gen", "alice", "x", "--base", "nope", says="tiny")
    ok("gen", alice, "x", "--steps", 1, "-n", 1, "-o", tmp_path / "fine.png")


def test_an_identity_of_another_family(alice: Path, tmp_path: Path) -> None:

    from hdbcli.identity.file import load, save

    path = tmp_path / "sd.safetensors"
    save(load(alice).saying(family="sd1", base="tiny"), path)
    refused("gen", path, "a [V] face", says="family sd1")


def test_unwritable_folder(alice: Path, tmp_path: Path, astronaut: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("in the way")
    refused("gen", "alice", "x", "-n", 1, "-o", blocked, says="is a file")
    refused("gen", "alice", "x", "-n", 1, "-o", blocked / "x.png", says="file")
    refused("merge", "alice", "--out", blocked / "m", says="file")


def test_unusable_options(alice: Path, astronaut: Path) -> None:
    refused("new", astronaut, "b", "--device", "cuda:7", says="not available")
    refused("new", astronaut, "b", "--optimizer", "sgd", says="adamw8bit")
    refused("new", astronaut, "b", "--rank", TINY[2] + 1, *QUICK, says="rank")
    assert hdb("new", astronaut, "b", "--steps", 0).exit_code == 2
    assert hdb("nonsense").exit_code == 2
    for words in ("gen a b --guidance", "gen a b --strength", "new a.png --likeness"):
        assert "not a number to work with" in hdb(*words.split(), "nan").stderr


def test_interrupt_leaves_nothing(
    alice: Path, astronaut: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from hdbcli.training import personalise

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(personalise, "portrait_loss", interrupt)
    monkeypatch.setattr(personalise, "refine", interrupt)
    result = hdb("new", astronaut, "bob", *QUICK)
    assert result.exit_code == 130 and "no file was left half-written" in result.stderr
    assert [p.name for p in alice.parent.iterdir()] == ["alice.safetensors"]


def test_console_script(hdb_home: Path) -> None:
    script = Path(sys.executable).with_name("hdb")
    done = subprocess.run([script, "list", "--json"], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and json.loads(done.stdout)["identities"] == []
    assert not done.stderr


def test_pictures_of_two_files_of_one_name_are_all_kept(tmp_path: Path) -> None:
    planned = plan_outputs(tmp_path, ["alice-1", "alice-1", "bob-1"], grid=False)
    assert [path.name for path in planned.pictures] == ["alice-1.png", "alice-1-2.png", "bob-1.png"]


def test_pictures_of_other_kinds_are_no_folders(tmp_path: Path) -> None:
    for name in ("alice.jpg", "alice.JPEG", "alice.webp"):
        with pytest.raises(HdbError, match=f"{name} is not named .png, the kind of picture"):
            plan_outputs(tmp_path / name, ["alice-1"], grid=False)
    assert list(tmp_path.iterdir()) == []
    for name in ("J.R", "alice.png", "old.jpg"):  # the control, a folder that is there the last
        (tmp_path / "old.jpg").mkdir(exist_ok=True)
        assert plan_outputs(tmp_path / name, ["alice-1"], grid=False).pictures


def test_new_shows_crop_and_portrait_and_what_to_type_next(
    hdb_home: Path, astronaut: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(BaseSpec, "sampling", SampleSettings(steps=2))
    words = "new", astronaut, "alice", "--no-refine", "--crop", "crop.png"
    done = ok(*words)
    lines = dict(line.split(None, 1) for line in done.stdout.splitlines())
    assert lines["preview"] == "alice-preview.png"
    assert lines["next"] == 'hdb gen alice "A Pixar character of a [V] face"'
    seen, crop = (np.asarray(Image.open(lines.get(n, "crop.png"))) for n in ("preview", ""))
    assert seen.shape[1] == 2 * 128 and (seen[-128:, :128] == crop).all()
    portrait, _ = (
        np.asarray(each.image)
        for each in api.generate("alice", PORTRAIT, count=2, seed=1, steps=2).pictures
    )
    assert abs(seen[-128:, 128:].astype(int) - portrait).mean() < 1 < abs(crop - portrait).mean()
    assert Image.open("alice-preview.png").info == {}
    ok(*words, "--force")
    made = told(*words, "--force", "--preview", tmp_path / "p.png")
    assert (
        made["preview"] == str(tmp_path / "p.png") and Image.open(tmp_path / "p.png").width == 256
    )
    assert sorted(path.name for path in Path().glob("*-preview*")) == [
        "alice-preview-2.png",
        "alice-preview.png",
    ]
    assert told(*words, "--force", "--no-preview")["preview"] is None
    refused(*words, "--force", "--preview", "p.jpg", says="not named .png")
    refused(*words, "--force", "--no-preview", "--preview", "p.png", says="drop it or --preview")
    name = Path(f"{'x' * 300}")  # no such file can be written
    monkeypatch.setattr(main, "free_path", lambda *_: name)
    assert "there will be no preview" in ok(*words, "--force").stderr


def test_styles_are_those_of_the_base(alice: Path) -> None:
    lines = ok("styles").stdout.splitlines()
    assert lines == list(CAPTIONS) == told("styles")["styles"]
    words = "gen", "alice", "--prompts", "-", "-n", "1", "--steps", "1"
    done = CliRunner().invoke(main.app, list(words), input="\n".join(lines[:2]))
    assert done.exit_code == 0 and len(done.stdout.splitlines()) == 2, done.stderr
    with pytest.MonkeyPatch.context() as patch:  # a base that draws whatever is described
        spec = replace(load_registry().get("tiny"), captions=())
        patch.setattr("registry.plugins.find_base", lambda _: spec)
        done = ok("styles")
        assert "tiny draws what you describe" in done.stderr
        assert "A [V] face as a rock star" in done.stdout
        assert told("styles")["known"] is False


def test_the_crop_is_saved_and_an_idle_face_number_told(
    hdb_home: Path, astronaut: Path, tmp_path: Path
) -> None:
    file = tmp_path / "crop.png"
    result = ok("new", astronaut, "a", "--crop", file, "--face", 1, "--no-refine")
    side = load_registry().get("tiny").resolution
    assert Image.open(file).size == (side, side)
    assert "--face 1 changes nothing" in result.stderr
    refused("new", astronaut, "b", "--crop", tmp_path / "crop.jpg", says="not named .png")
    refused("new", file, "b", "--crop", file, says="is the input file")
