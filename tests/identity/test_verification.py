"""Taking identities in, verifying, deleting and tidying up: all checked, and never one too many."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from commands import hdb, ok, refused
from identities import describe
from safetensors.torch import save_file

from hdbcli.identity.file import Identity, Weights, load, save
from hdbcli.method.lidb import Theta
from hdbcli.model.base import Base
from registry import store
from registry.bases.settings import set_hypernetwork, settings_path
from registry.checkpoints.lora_formats import lora_style
from registry.checkpoints.safetensors import read_header
from registry.errors import HdbError
from registry.orphans import temporaries
from registry.spec import BaseSpec

Keep = Callable[..., Path]


def files() -> list[str]:
    return sorted(str(path) for path in store.root().rglob("*") if path.is_file())


@pytest.fixture
def identity(tiny: Base) -> Identity:
    """Return an identity that is at home on `tiny`."""
    theta = tiny.first_theta(2)
    generator = torch.Generator().manual_seed(0)
    up = 0.1 * torch.randn(theta.up.shape, generator=generator)
    return describe(tiny, Theta(theta.down, up), "")


@pytest.fixture
def outside(identity: Identity, hdb_home: Path, tmp_path: Path) -> Path:
    path = tmp_path / "Søren (2).safetensors"
    save(identity, path)
    return path


def temporary(size: int = 100, age: float = 3600.0, place: str = "identities") -> Path:
    """Leave a temporary file as a killed run would."""
    path = store.root() / place / f".{os.urandom(8).hex()}.tmp"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(bytes(size))
    os.utime(path, (time.time() - age,) * 2)
    return path


def test_import_takes_a_checked_file_in(outside: Path) -> None:
    values = json.loads(ok("import", outside, "--json").stdout)
    path = store.path_of("Soren-2")
    assert values["name"] == "Soren-2" and values["path"] == str(path)
    assert values["bytes"] == path.stat().st_size and values["verified"] is True
    assert values["base"] == "tiny" and values["rank"] == 2
    assert path.read_bytes() == outside.read_bytes()
    assert "bob" in ok("import", outside, "bob").stdout
    refused("import", outside, "BOB", says="bob exists already")
    ok("import", outside, "BOB", "--force")
    assert store.names() == ["bob", "Soren-2"]
    refused("import", outside, "../bob", says="not a valid name")
    refused("import", outside.with_name("none.safetensors"), says="no such file")
    assert ok("gen", "bob", "a [V] face", "-n", 1, "--steps", 1, "-o", outside.with_suffix(".png"))


def test_import_refuses_what_does_not_belong_here(
    outside: Path, identity: Identity, tmp_path: Path
) -> None:
    path = tmp_path / "odd.safetensors"
    for changes, says in (
        ({"basis_digest": "0" * 64}, "in basis"),
        ({"seed": 1}, "in basis"),
        ({"targets_digest": "0" * 64}, "with targets 000000000000"),
        ({"family": "sd1"}, "family sd1"),
    ):
        save(identity.saying(**changes), path)
        refused("import", path, says=says)
    save(identity.saying(base="sd15"), path)  # the control: a base that is not here can come
    result = ok("import", path, "--json")
    assert json.loads(result.stdout)["verified"] is None and "unknown base model" in result.stderr
    save(identity.saying(base_digest="0" * 64), path)  # and a fine-tune only warns
    result = ok("import", path, "tuned", "--json")
    assert json.loads(result.stdout)["verified"] is True and "likeness may suffer" in result.stderr


def test_import_refuses_hostile_files(outside: Path, tmp_path: Path) -> None:
    whole, bad = outside.read_bytes(), tmp_path / "bad.safetensors"
    length = int.from_bytes(whole[:8], "little")
    head, content = whole[8 : 8 + length], whole[8 + length :]

    def with_header(text: bytes) -> bytes:
        return len(text).to_bytes(8, "little") + text + content

    for raw, says in (
        (b"", "not a safetensors"),
        (whole[:-1], "truncated"),
        (whole + b"\0", "too many"),
        (whole[:-1] + bytes([whole[-1] ^ 1]), "edited by hand"),
        (with_header(head.replace(b'"up"', b'"up":1,"up"')), "comes twice"),
        (with_header(head.replace(b'"up"', b'"__import__"')), "not the ['down', 'up']"),
        (with_header(head.replace(b'"hdb.version":"1"', b'"hdb.version":"2"')), "newer hdb"),
        (with_header(head.replace(b'"hdb.rank":"2"', b'"hdb.rank":"60"')), "rank 60 is above b"),
        ((2**40).to_bytes(8, "little") + whole[8:], "is refused"),
        (b"PK\x03\x04" + whole, "can run code"),
        (b"\x80\x04\x95" + whole, "can run code"),
        (b"\xff\xd8\xff\xe0" + whole, "not a safetensors"),
    ):
        bad.write_bytes(raw)
        refused("import", bad, says=says)
    bad.write_bytes(whole)
    with open(bad, "ab") as file:  # sparse: large to stat, nothing on the disk
        file.truncate(2**34)
    refused("import", bad, says="too many")
    bad.write_bytes(whole)
    ok("import", bad)  # the control


def test_a_lora_is_recognised_and_told_why_not(outside: Path, tmp_path: Path) -> None:
    ok("import", outside, "alice")
    for form in ("kohya", "diffusers"):
        lora = tmp_path / f"{form}.safetensors"
        ok("export", "alice", "--format", form, "-o", lora)
        said = refused("import", lora, says=f"is a LoRA with {form} keys")
        assert "under 5 %" in said and "hdb new PHOTO" in said
    big = tmp_path / "big.safetensors"  # over what an identity may be: told what it is all the same
    save_file({"lora_unet_mid.lora_up.weight": torch.zeros(2**21, 4)}, big)
    refused("import", big, says="kohya keys")
    save_file({"model.weight": torch.zeros(3)}, big)  # the control
    refused("import", big, says="not an identity of hdb")


@pytest.mark.parametrize(
    ("name", "style"),
    [
        ("lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight", "kohya"),
        ("lora_te1_text_model_encoder_layers_0_mlp_fc1.alpha", "kohya"),
        ("lycoris_blocks_0_attn.lokr_w1", "kohya"),
        ("unet.mid_block.attentions.0.to_q.lora_A.weight", "diffusers"),
        ("base_model.model.to_q.lora_B.default.weight", "PEFT"),
        ("diffusion_model.input_blocks.1.1.proj_in.lora_up.weight", "ComfyUI"),
        ("mid_block.attentions.0.to_q.lora_A.weight", "diffusers"),
        ("model.snake.alpha", None),
        ("unet.mid_block.attn1.processor.to_q_lora.up.weight", "diffusers"),
        ("text_encoder.text_model.q_proj.lora_linear_layer.down.weight", "diffusers"),
        ("down", None),
        ("up_scale", None),
        ("model.diffusion_model.input_blocks.0.0.weight", None),
    ],
)
def test_keys_of_loras(name: str, style: str | None) -> None:
    assert lora_style([name]) == style


def test_a_random_basis_keeps_little_of_a_foreign_lora() -> None:
    from hdbcli.method.basis import down_basis, up_basis

    n = m = 320  # the narrowest targets of Stable Diffusion 1.x keep the most
    generator = torch.Generator().manual_seed(0)
    up, down = (torch.randn(shape, generator=generator) for shape in ((n, 4), (4, m)))
    left, right = up_basis(7, "x", 50, n), down_basis(7, "x", 100, m)
    kept = (left.T @ up @ down @ right.T).square().sum() / (up @ down).square().sum()
    assert 0.01 < kept < 0.055  # (100 / 320) (50 / 320) = 4.9 % on average
    own = left @ left.T @ up @ down @ right.T @ right  # the control: what lives in it stays
    again = (left.T @ own @ right.T).square().sum() / own.square().sum()
    assert again == pytest.approx(1, abs=1e-4)


def test_verify_reads_all_of_every_file(outside: Path, identity: Identity) -> None:
    assert json.loads(ok("verify", "--json").stdout)["identities"] == []
    for name in ("alice", "bob", "carol"):
        ok("import", outside, name)
    found = json.loads(ok("verify", "--json").stdout)["identities"]
    assert [(v["name"], v["ok"], v["basis"]) for v in found] == [
        (name, True, True) for name in ("alice", "bob", "carol")
    ]
    path = store.path_of("bob")
    data = bytearray(path.read_bytes())
    data[-1] ^= 1  # in the numbers: a list does not see it
    path.write_bytes(data)
    assert all(entry.problem is None for entry in store.entries())
    save(identity.saying(seed=3), store.path_of("dave"))
    save(identity.saying(base="sd15"), store.path_of("erin"))
    (path.parent / "a b.safetensors").write_bytes(outside.read_bytes())
    result = hdb("verify", "--json")
    found = {v["name"]: v for v in json.loads(result.stdout)["identities"]}
    assert result.exit_code == 1 and "3 of 6 are bad" in result.stderr
    assert [n for n, v in found.items() if not v["ok"]] == ["a b", "bob", "dave"]
    assert "edited by hand" in found["bob"]["problem"]
    assert found["dave"]["basis"] is False and "in basis" in found["dave"]["problem"]
    assert found["erin"]["basis"] is None and "not verified" in found["erin"]["problem"]
    result = hdb("verify")
    assert result.exit_code == 1 and result.stdout.count("BAD") == 3
    assert ok("verify", "alice", outside).stdout.count("good") == 2  # names, or files
    assert hdb("verify", "bob").exit_code == 1
    refused("verify", "missing", says="unknown identity")


def test_a_trainers_long_metadata_are_read_and_an_identitys_are_not(tmp_path: Path) -> None:
    save_file({"x": torch.zeros(1)}, tmp_path / "lora.safetensors", {"tags": "a" * 2**21})
    assert len(read_header(tmp_path / "lora.safetensors", 2**34).metadata["tags"]) == 2**21
    with pytest.raises(HdbError, match="is refused"):
        read_header(tmp_path / "lora.safetensors")


def test_copies_and_renames_say_their_bytes(outside: Path) -> None:
    ok("import", outside, "alice")
    size = outside.stat().st_size
    for words, name in ((("cp", "alice", "bob"), "bob"), (("mv", "bob", "carol"), "carol")):
        values = json.loads(ok(*words, "--json").stdout)
        said = {"name": name, "path": str(store.path_of(name)), "bytes": size}
        assert values.items() >= (said | {"was": "bob"} if words[0] == "mv" else said).items()
    assert store.names() == ["alice", "carol"]
    ok("mv", "carol", "Carol")  # a change of case is no clash with itself
    assert os.listdir(store.folder()) and store.names() == ["alice", "Carol"]
    refused("mv", "Carol", "ALICE", says="alice exists already")
    refused("mv", "Carol", "carol.safetensors", says="drop .safetensors")


def test_verify_opens_each_base_once(
    identity: Identity, outside: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from hdbcli.identity import verification

    opened = []

    def weights_of(name: str, digest: str) -> tuple[BaseSpec, Weights]:
        opened.append(name)
        raise HdbError("not here")

    monkeypatch.setattr(verification, "weights_of", weights_of)
    verdicts = list(verification.verify([outside] * 3))
    assert opened == ["tiny"] and [(v.ok, v.basis) for v in verdicts] == [(True, None)] * 3


def test_rm_says_the_bytes_and_purge_leaves_nothing(outside: Path) -> None:
    for name in ("alice", "bob", "Bob2"):
        ok("import", outside, name)
    ok("compose", "alice=0.5", "bob=0.5", "--as", "both")
    young, old = temporary(7, age=0), temporary(9)
    size = store.path_of("Bob2").stat().st_size
    values = json.loads(ok("rm", "bob2", "bob2", "-y", "--json").stdout)
    assert values["bytes"] == size and [f["name"] for f in values["deleted"]] == ["Bob2"]
    assert young.exists() and old.exists()  # without --purge they stay
    result = ok("rm", "alice", "-y", "--purge", "--json")
    values = json.loads(result.stdout)
    assert values["bytes"] == size + 7 + 9 and not young.exists() and not old.exists()
    assert "both was composed of alice" in result.stderr and "bob" not in result.stderr
    assert store.names() == ["bob", "both"]
    store.path_of("bob").write_bytes(b"damaged")
    assert "deleted bob  7 bytes" in ok("rm", "bob", "-y").stdout
    refused("rm", "both", says="--yes")
    refused("rm", "both", "missing", "-y", says="unknown identity")  # and `both` is still there


def test_gc_never_takes_an_identity(outside: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HDB_PLUGINS", raising=False)
    ok("import", outside, "alice")
    old, young = temporary(100), temporary(50, age=0)
    of_base = temporary(10, place="bases")
    set_hypernetwork("tiny", outside), set_hypernetwork("gone", outside)
    here = store.folder()
    kept = [here / "cut.safetensors", here / ".hidden", here / ".0123.tmp", here / "notes.txt"]
    for path in kept:
        path.write_bytes(b"mine")
    (here / ".0123456789abcdef.tmp").symlink_to(outside)
    settings = settings_path("gone")
    size = 110 + settings.stat().st_size
    before = files()
    values = json.loads(ok("gc", "--dry-run", "--json").stdout)
    assert values["dry_run"] is True and values["bytes"] == size and files() == before
    assert {f["path"] for f in values["files"]} == {str(old), str(of_base), str(settings)}
    monkeypatch.setenv("HDB_PLUGINS", "")  # then a base may be there and not be seen
    assert "left alone" in hdb("gc", "--dry-run").stderr
    assert "110 bytes would be freed" in ok("gc", "--dry-run").stdout
    monkeypatch.delenv("HDB_PLUGINS")
    assert f"{size} bytes were freed" in ok("gc").stdout
    assert set(before) - set(files()) == {str(old), str(of_base), str(settings)}
    assert young.exists() and settings_path("tiny").exists() and load(store.path_of("alice"))
    assert ok("gc", "--json").stdout.count("path") == 0


def test_the_temporary_files_that_hdb_writes_are_known(hdb_home: Path) -> None:
    with store.write_beside(store.path_of("alice")) as beside:
        assert [orphan.path for orphan in temporaries(older=0)] == [beside]
        assert temporaries() == []  # it is in the writing
    assert temporaries(older=0) == [] and store.names() == ["alice"]


def test_gc_of_no_store_is_fine(hdb_home: Path) -> None:
    assert json.loads(ok("gc", "--json").stdout)["files"] == []
    assert not hdb_home.exists()
