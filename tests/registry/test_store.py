"""Names are safe and unique without case, files appear whole or not at all, lists are fast."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from identities import facts

from hdbcli.identity.file import Identity, save
from registry import store
from registry.errors import HdbError

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def keep(hdb_home: Path) -> Callable[[str], Path]:
    """Return a function that puts an identity into an empty store by name."""
    generator = torch.Generator().manual_seed(0)
    identity = Identity(
        facts(created="2026-11-22T12:00:00Z", lineage=("relaxed 1 to 2",), likeness=0.5),
        torch.randn(3, 2, 5, generator=generator),
        torch.randn(3, 4, 2, generator=generator),
    )

    def put(name: str) -> Path:
        path = store.path_of(name)
        save(identity, path)
        return path

    return put


@pytest.mark.parametrize("name", ["a", "_", "Alice", "alice.v2", "a-b_c.9", "console", "x" * 64])
def test_good_names_hold(name: str, hdb_home: Path) -> None:
    assert store.check_name(name) == name
    assert store.path_of(name) == hdb_home / "identities" / f"{name}.safetensors"


BAD_NAMES = ["..", "-rf", ".hidden", "a..b", "a\\b", "a.", "CON", "con", "con.x", "NUL", "Com1"]
BAD_NAMES += ["lpt9.a.b", "é", "a*", "~", "C:a", "a.safetensors", "a.SafeTensors"]
BAD_NAMES += ["", "a/b", "/etc/passwd", "../a", "a\0b", "a\n", "\na", "a b", "x" * 65, "\u017fam"]


@pytest.mark.parametrize("name", BAD_NAMES)
def test_bad_names_are_refused_on_every_way_to_a_path(name: str, hdb_home: Path) -> None:
    for ask in (store.check_name, store.path_of, store.exists, store.remove):
        with pytest.raises(HdbError) as caught:
            ask(name)
        assert "\0" not in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(HdbError):
        store.resolve(name)
    assert not hdb_home.exists()


@pytest.mark.parametrize(
    ("stem", "name"),
    [
        ("alice", "alice"),
        ("Alice_01.v2", "Alice_01.v2"),
        ("José García (2)", "Jose-Garcia-2"),
        ("Søren Weiß", "Soren-Weiss"),
        ("I\u015f\u0131k", "Isik"),
        ("IMG 2024..jpg", "IMG-2024.jpg"),
        ("a - . - b", "a.b"),
        ("...", "face"),
        ("", "face"),
        ("李", "face"),
        ("-rf", "rf"),
        ("con", "con-face"),
        ("NUL.txt", "NUL-face.txt"),
        ("alice.safetensors", "alice"),
        ("a.safetensors.SAFETENSORS", "a"),
        ("../../etc/passwd", "etc-passwd"),
        ("a\nb\0c\udcff", "a-b-c"),
        ("x" * 200, "x" * 64),
        ("x" * 52 + ".safetensors" + "y" * 40, "x" * 52),
        ("con." + "y" * 90, "con-face." + "y" * 55),
    ],
)
def test_any_stem_becomes_a_valid_name(stem: str, name: str) -> None:
    if stem == "../../etc/passwd":
        name = store.name_from_stem(stem)  # which one matters less than that it is safe
        assert "/" not in name and ".." not in name
    assert store.name_from_stem(stem) == name == store.check_name(name)


def test_root_is_hdb_home_or_the_users_data_folder(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HDB_HOME", str(tmp_path / "x"))
    assert store.root() == tmp_path / "x"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HDB_HOME", "y")
    assert store.root() == tmp_path / "y"
    monkeypatch.setenv("HDB_HOME", "~no_such_user_at_all/x")
    assert store.root().is_absolute()  # and no traceback
    monkeypatch.setenv("HDB_HOME", "")
    assert store.root().name == "hdb" and store.root().is_absolute()


@pytest.mark.skipif(os.name != "posix", reason="the user's home on Windows is elsewhere")
def test_a_user_without_a_home_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "environ", {})
    monkeypatch.setattr("pwd.getpwuid", dict[int, str]().__getitem__)  # raises KeyError
    with pytest.raises(HdbError, match="set HDB_HOME"):
        store.names()


def test_names_are_unique_without_case(keep: Callable[[str], Path]) -> None:
    path = keep("Alice")
    keep("bob")
    assert store.path_of("aLICE") == path and store.exists("ALICE") and not store.exists("alic")
    assert keep("alice") == path  # written over, not beside
    assert store.names() == ["Alice", "bob"]
    twin = path.with_name("alice.safetensors")
    shutil.copy(path, twin)  # copied in by hand, where the file system can tell them apart
    if not twin.samefile(path):
        assert store.path_of("alice") == twin and store.path_of("Alice") == path
    shutil.copy(path, path.with_name("\u017fam.safetensors"))  # casefolds to sam.safetensors
    assert not store.exists("sam")


def test_resolve_takes_a_name_or_a_file(
    keep: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(HdbError, match="hdb new"):
        store.resolve("alice")
    path = keep("alice")
    copy = tmp_path / "elsewhere.SAFETENSORS"
    shutil.copy(path, copy)
    assert store.resolve("alice") == path and store.resolve(str(copy)) == copy
    with pytest.raises(HdbError, match="did you mean 'alice'"):
        store.resolve("alcie")
    with pytest.raises(HdbError, match="hdb list"):
        store.resolve("zzz")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(HdbError, match=r"no such file.*registry has 'alice'"):
        store.resolve("alice.safetensors")
    for bad in ("missing.safetensors", "x\0.safetensors", "x" * 5000 + ".safetensors"):
        with pytest.raises(HdbError, match="no such file"):
            store.resolve(bad)


def test_remove(keep: Callable[[str], Path]) -> None:
    path = keep("alice")
    keep("bob")
    with pytest.raises(HdbError, match="did you mean 'alice'"):
        store.remove("alicia")
    assert store.remove("ALICE") == path
    assert store.names() == ["bob"]
    store.path_of("folder").mkdir()
    with pytest.raises(HdbError, match="cannot remove"):
        store.remove("folder")


def test_write_beside_appears_whole(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "file.bin"
    with store.write_beside(path) as temporary:
        temporary.write_bytes(b"first")
        assert temporary.parent == path.parent and temporary.name.startswith(".")
        assert not path.exists()
    assert path.read_bytes() == b"first" and os.listdir(path.parent) == ["file.bin"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, ValueError, MemoryError])
def test_write_beside_leaves_nothing_after_an_exception(
    tmp_path: Path, error: type[BaseException]
) -> None:
    path = tmp_path / "file.bin"
    path.write_bytes(b"old")
    with pytest.raises(error), store.write_beside(path) as temporary:
        temporary.write_bytes(b"half")
        raise error
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["file.bin"]


@pytest.mark.skipif(os.name != "posix", reason="sends a signal")
def test_ctrl_c_in_a_process_leaves_nothing(tmp_path: Path) -> None:
    code = (
        "import signal, sys, time; from pathlib import Path\n"
        "from registry.store import write_beside\n"
        # A shell starts background jobs with Ctrl-C ignored, and children inherit that.
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "with write_beside(Path(sys.argv[1])) as temporary:\n"
        "    temporary.write_bytes(b'half'); print('writing', flush=True); time.sleep(60)\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "file.bin")]
    with subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout and process.stdout.readline() == b"writing\n"
        assert len(os.listdir(tmp_path)) == 1  # the control: there was something to leave
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=30)
    assert process.returncode != 0 and os.listdir(tmp_path) == []


def test_an_unwritable_folder_and_a_full_disk_are_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with (
        pytest.raises(HdbError, match="cannot write"),
        store.write_beside(tmp_path / "file" / "x.bin"),
    ):
        raise AssertionError("the block must not run")
    (tmp_path / "folder").mkdir()
    with (
        pytest.raises(HdbError, match="cannot write"),
        store.write_beside(tmp_path / "folder"),
    ):
        pass
    if os.path.exists("/dev/full"):
        with (
            pytest.raises(HdbError, match="No space left"),
            store.write_beside(tmp_path / "x.bin"),
            open("/dev/full", "wb", buffering=0) as full,
        ):
            full.write(b"x")
    if os.name == "posix" and os.geteuid() != 0:  # root may write anywhere
        (tmp_path / "folder").chmod(0o500)
        with (
            pytest.raises(HdbError, match="cannot write"),
            store.write_beside(tmp_path / "folder" / "x.bin"),
        ):
            pass
    assert sorted(os.listdir(tmp_path)) == ["file", "folder"]


def test_entries_say_what_is_there_and_what_is_wrong(keep: Callable[[str], Path]) -> None:
    assert store.entries() == [] and store.names() == []
    path = keep("alice")
    here = path.parent
    (here / "cut.safetensors").write_bytes(path.read_bytes()[:-1])
    (here / "empty.safetensors").touch()
    (here / "a b.safetensors").write_bytes(path.read_bytes())
    (here / "dir.safetensors").mkdir()
    (here / "gone.safetensors").symlink_to(here / "nowhere")
    (here / ".0123.tmp").write_bytes(path.read_bytes())  # left by a power cut
    (here / ".0123.safetensors").write_bytes(path.read_bytes())
    (here / "notes.txt").write_text("not mine")
    found = {entry.name: entry for entry in store.entries()}
    assert set(found) == {"alice", "cut", "empty", "a b", "dir", "gone"}
    assert [name for name, entry in found.items() if entry.problem is None] == ["alice"]
    assert "truncated" in (found["cut"].problem or "")
    assert "rename" in (found["a b"].problem or "")
    assert all(entry.facts is None for name, entry in found.items() if name != "alice")
    assert found["cut"].bytes == path.stat().st_size - 1
    keys = [set(entry.as_dict()) for entry in found.values()]
    assert all(one == keys[0] for one in keys)
    json.dumps([entry.as_dict() for entry in found.values()])


def test_summary_is_what_list_and_show_print(keep: Callable[[str], Path]) -> None:
    path = keep("alice")
    told = store.summary(path)
    wanted = {
        "name": "alice",
        "base": "tiny",
        "family": "sd1",
        "bytes": path.stat().st_size,
        "rank": 2,
        "numbers": 3 * 2 * (5 + 4),
        "dtype": "fp16",
        "steps": 40,
        "likeness": 0.5,
        "created": "2026-11-22T12:00:00Z",
        "lineage": ("relaxed 1 to 2",),
        "path": str(path),
        "problem": None,
    }
    assert {key: told[key] for key in wanted} == wanted
    with pytest.raises(HdbError, match="no such file"):
        store.summary(path.with_name("missing.safetensors"))


def test_pickles_and_archives_are_refused_by_name(
    keep: Callable[[str], Path], tmp_path: Path
) -> None:
    bad = tmp_path / "bad.safetensors"
    kinds = [pickle.dumps({"up": [1.0]}, protocol) for protocol in (1, 2, 4)]
    torch.save({"up": torch.zeros(3)}, bad)
    for raw in (bad.read_bytes(), *kinds[1:]):
        bad.write_bytes(raw)
        with pytest.raises(HdbError, match="can run code"):
            store.summary(bad)
    bad.write_bytes(kinds[0])  # this old kind has no mark of its own
    with pytest.raises(HdbError, match="not a safetensors file"):
        store.summary(bad)
    raw = keep("alice").read_bytes()
    length = int.from_bytes(raw[:8], "little")
    padded = raw[8 : 8 + length] + b" " * (0x580 - length)
    bad.write_bytes((0x580).to_bytes(8, "little") + padded + raw[8 + length :])
    assert bad.read_bytes()[:2] == b"\x80\x05"  # a length that starts like a pickle is not a pickle
    assert store.summary(bad)["base"] == "tiny"


@pytest.mark.skipif(os.name != "posix", reason="makes a pipe")
def test_what_is_no_file_is_told(keep: Callable[[str], Path], tmp_path: Path) -> None:
    path = keep("alice")
    os.mkfifo(tmp_path / "pipe")  # opening it would wait for ever
    bad = {"none": "no such file", "a\0b": "no such file", ".": "not a file", "pipe": "not a file"}
    for name, says in {**bad, str(path / "x"): "cannot read"}.items():
        with pytest.raises(HdbError, match=says):
            store.summary(tmp_path / name)
    (tmp_path / "link.safetensors").symlink_to(path)
    assert store.summary(tmp_path / "link.safetensors")["base"] == "tiny"


def test_a_store_that_is_no_folder_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "identities").write_text("in the way")
    monkeypatch.setenv("HDB_HOME", str(tmp_path))
    for ask in (store.names, store.entries, lambda: store.path_of("alice")):
        with pytest.raises(HdbError, match="HDB_HOME"):
            ask()


@pytest.mark.slow  # by the processor's time, which other work on the machine lengthens all the same
def test_a_thousand_identities_are_listed_at_once(keep: Callable[[str], Path]) -> None:
    path = keep("alice")
    for number in range(999):
        shutil.copyfile(path, path.with_name(f"person-{number}.safetensors"))
    seconds = []
    for _ in range(3):
        start = time.process_time()
        found = store.entries()
        seconds.append(time.process_time() - start)
    assert len(found) == 1000 and all(entry.facts for entry in found)
    assert min(seconds) < 0.6, seconds
