"""Files are written whole or not at all, and finished work is not lost, whatever a file
system refuses."""

from __future__ import annotations

import errno
import os
import re
import stat
import tempfile
from pathlib import Path

import pytest

from registry import files
from registry.errors import HdbError
from registry.files import Taken, check_writable, move_to_new, write_beside, write_kept

REFUSED = (errno.EPERM, errno.ENOTSUP, errno.EINVAL, errno.ENOSYS)
BROKEN = (errno.ENOSPC, errno.EIO)
EXTRAS = ("chmod", "fsync", "link")


def refuse(patch: pytest.MonkeyPatch, name: str, number: int) -> None:
    """Let a function of `os` fail as a file system without that operation, or a broken one."""

    def fails(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    patch.setattr(files.os, name, fails)


def kept_in(error: BaseException) -> Path:
    """Return the place that an error says the result is in."""
    found = re.search(r"the result is kept in (.+?)(;|$)", str(error))
    assert found, str(error)
    return Path(found[1])


@pytest.mark.parametrize("number", REFUSED)
@pytest.mark.parametrize("names", [*((name,) for name in EXTRAS), EXTRAS], ids="+".join)
def test_what_a_file_can_do_without_is_let_go(
    names: tuple[str, ...], number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in names:
        refuse(monkeypatch, name, number)
    path = tmp_path / "folder" / "x.bin"
    for content, new in ((b"first", True), (b"second", False)):
        check_writable(path)
        with write_beside(path, new) as beside:
            beside.write_bytes(content)
        assert path.read_bytes() == content and os.listdir(path.parent) == ["x.bin"]
    with pytest.raises(Taken, match="appeared"), write_beside(path, new=True) as beside:
        beside.write_bytes(b"third")
    assert path.read_bytes() == b"second"


@pytest.mark.parametrize("number", BROKEN)
def test_a_flush_that_fails_is_no_refusal(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "x.bin"
    path.write_bytes(b"older")
    refuse(monkeypatch, "fsync", number)
    with pytest.raises(HdbError, match=os.strerror(number)), write_beside(path) as beside:
        beside.write_bytes(b"newer")
    with pytest.raises(HdbError, match=f"{path}: {os.strerror(number)}"):
        check_writable(path)
    assert path.read_bytes() == b"older" and os.listdir(tmp_path) == ["x.bin"]


def test_where_nothing_can_be_renamed_new_files_are_copied(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "x.bin"
    for name in ("replace", "link"):
        refuse(monkeypatch, name, errno.ENOSYS)
    check_writable(path)
    with write_beside(path, new=True) as beside:
        beside.write_bytes(b"first")
    assert path.read_bytes() == b"first" and os.listdir(tmp_path) == ["x.bin"]
    with pytest.raises(HdbError, match=f"cannot write {path}: Function not implemented"):
        check_writable(path)  # half a copy over the older one could cost both
    with pytest.raises(HdbError) as error:
        write_kept(path, lambda file: file.write_bytes(b"second"))
    assert kept_in(error.value).read_bytes() == b"second"
    assert path.read_bytes() == b"first" and os.listdir(tmp_path) == ["x.bin"]


def test_a_rehearsal_leaves_nothing_and_refuses_what_the_write_would(tmp_path: Path) -> None:
    path = tmp_path / "x.bin"
    check_writable(path)
    check_writable(tmp_path / "new" / "x.bin")
    assert os.listdir(tmp_path) == ["new"] and not os.listdir(tmp_path / "new")
    path.write_bytes(b"older")
    check_writable(path)
    assert sorted(os.listdir(tmp_path)) == ["new", "x.bin"]
    assert path.read_bytes() == b"older"
    for bad, why in ((tmp_path / "new", "not a plain file"), (tmp_path / ("n" * 300), "too long")):
        with pytest.raises(HdbError, match=why):
            check_writable(bad)
    with pytest.raises(HdbError, match="cannot write"):
        check_writable(path / "below a file")


@pytest.mark.skipif(os.name != "posix", reason="links")
def test_a_link_stays_and_what_it_leads_to_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "far").mkdir()
    real, link = tmp_path / "far" / "real.bin", tmp_path / "link.bin"
    real.write_bytes(b"older")
    real.chmod(0o640)
    link.symlink_to("far/real.bin")
    check_writable(link)
    with write_beside(link) as beside:
        assert beside.parent == real.parent  # on its file system, so that a rename is possible
        beside.write_bytes(b"newer")
    assert os.readlink(link) == "far/real.bin" and real.read_bytes() == b"newer"
    assert stat.S_IMODE(real.stat().st_mode) == 0o640 and os.listdir(real.parent) == ["real.bin"]
    with pytest.raises(Taken), write_beside(link, new=True) as beside:
        beside.write_bytes(b"another")
    move_to_new(link, tmp_path / "moved.bin")  # the link, and no second name of the file
    assert os.readlink(tmp_path / "moved.bin") == "far/real.bin" and not link.is_symlink()
    assert real.stat().st_nlink == 1 and real.read_bytes() == b"newer"


def test_finished_work_is_kept_elsewhere_and_the_place_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    path, full = tmp_path / "store" / "alice.bin", [tmp_path / "store"]

    def write(file: Path) -> None:
        if any(place in file.parents for place in full):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        file.write_bytes(b"hours of work")

    for place in ("temporary", "home", "."):
        (tmp_path / place).mkdir(exist_ok=True)
        with pytest.raises(HdbError, match=f"cannot write {path}: No space left") as error:
            write_kept(path, write)
        kept = kept_in(error.value)
        assert kept.read_bytes() == b"hours of work" and kept.name == path.name
        assert kept.parent.parent == (tmp_path / place).resolve()
        if os.name == "posix":  # a face is personal data
            assert stat.S_IMODE(kept.parent.stat().st_mode) == 0o700
        assert not os.listdir(path.parent)
        full.append(tmp_path / place)
    with pytest.raises(HdbError, match="no other folder could take the result"):
        write_kept(path, write)
    assert len(list(tmp_path.glob("**/hdb-*"))) == 3  # nothing is left of what failed
    full.clear()
    write_kept(path, write)  # the control
    assert path.read_bytes() == b"hours of work"
