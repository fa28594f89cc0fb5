"""Write files whole or not at all, also where the file system refuses what it has no word for.

Network shares (SMB), FUSE and object stores may refuse permissions, flushes, links or renames. What
a file can do without is tried and let go; `check_writable` rehearses the rest before any work.
"""

from __future__ import annotations

import errno
import os
import shutil
import stat
import tempfile
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from registry.errors import HdbError, UsageError

# How a file system says that it does not know an operation; a full or broken disk says otherwise.
REFUSALS = {errno.EPERM, errno.EACCES, errno.EINVAL, errno.ENOSYS, errno.ENOTTY, errno.EBADF}
REFUSALS |= {errno.ENOTSUP, errno.EOPNOTSUPP, errno.EXDEV, errno.EMLINK, errno.ESPIPE}
CHUNK = 2**22  # bytes hashed at a time

# Names of files of weights and of other kinds, none of which a folder is called.
WEIGHTS = {".safetensors", ".bin", ".ckpt", ".pt", ".pth", ".msgpack", ".onnx", ".h5"}
OTHER_FILES = {".html", ".htm", ".txt", ".md", ".json", ".csv", ".pdf", ".svg", ".zip", ".mp4"}


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn an OSError in the block into HdbError: a file or folder cannot be read."""
    try:
        yield
    except OSError as error:
        raise HdbError(f"cannot read {path}: {error.strerror or error}") from error


def sha256_of(path: Path, start: int = 0) -> str:
    """Hash what a file holds from this byte on, some megabytes at a time."""
    import hashlib  # loads OpenSSL, which a list never needs

    digest = hashlib.sha256()
    with reading(path), path.open("rb") as file:
        file.seek(start)
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


class Taken(HdbError):
    """A file that was to be new is there by now."""


@contextmanager
def write_beside(path: Path, new: bool = False) -> Iterator[Path]:
    """Yield a temporary file in the folder of `path`, and rename it to `path` at the end.

    The block should do nothing but write: after any exception, Ctrl-C included, the temporary
    file is deleted and an older `path` is untouched. An OSError, in the block too, becomes an
    HdbError, and so does a `path` that is a device or a pipe; Taken is raised where `path` is there
    by then although it is to be `new`. A link stays, and the file it leads to is replaced.

    The temporary name starts with a dot, which no identity's name does.
    """
    said, temporary = path, None
    try:
        if path.is_symlink() and not new:
            path = Path(os.path.realpath(path))
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists() and not path.is_file():  # root may replace /dev/null for all users
            raise HdbError(f"cannot write {said}: it is not a plain file; give another name")
        temporary = temporary_beside(path)
        with open(temporary, "xb") as file:  # here, so that an unwritable folder is told first
            mode = os.fstat(file.fileno()).st_mode
        if path.exists():  # whom it was hidden from does not see the new one either
            mode = path.stat().st_mode
            _permit(temporary, mode | stat.S_IRUSR | stat.S_IWUSR)
        yield temporary
        flush(temporary)
        _permit(temporary, mode)  # a library may have put a file of its own there
        (move_to_new if new else _move_over)(temporary, path)
    except BaseException as error:
        if temporary is not None:
            with suppress(OSError):
                temporary.unlink()
        if isinstance(error, OSError):
            raise HdbError(f"cannot write {said}: {error.strerror or error}") from error
        raise


def write_kept(path: Path, write: Callable[[Path], object], new: bool = False) -> None:
    """Write the result of long work as `write_beside` does: `write` fills the file it is given.

    Where that fails the result is written elsewhere, and the HdbError says where. Taken is raised
    as it is, since only the caller knows another name.
    """
    try:
        with write_beside(path, new) as beside:
            write(beside)
    except Taken:
        raise
    except HdbError as error:
        raise HdbError(f"{error}; {keep_elsewhere(path.name, write)}") from error


def keep_elsewhere(name: str, write: Callable[[Path], object]) -> str:
    """Write a result that has lost its place into a new private folder; return words that say
    where it is."""
    places: list[Callable[[], str]] = [tempfile.gettempdir, lambda: str(Path.home()), os.getcwd]
    for place in places:
        with suppress(OSError, RuntimeError, HdbError):  # no such folder, or no room there either
            folder = tempfile.mkdtemp(prefix="hdb-", dir=place())
            try:
                with write_beside(Path(folder, name), new=True) as beside:
                    write(beside)
            except BaseException:
                shutil.rmtree(folder, ignore_errors=True)
                raise
            return f"the result is kept in {Path(folder, name)}"
    return "no other folder could take the result"


def check_writable(path: Path) -> None:
    """Raise HdbError now, not after the work, if `path` could not be written.

    Beside it a file is written, flushed and renamed as the result will be, over another if there
    is one, and deleted.
    """
    try:
        place = Path(os.path.realpath(path))
        with suppress(FileNotFoundError, NotADirectoryError):
            place.lstat()  # a name may be too long
        if place.exists() and not place.is_file():
            raise HdbError(f"cannot write {path}: it is not a plain file; give another name")
        rehearsal, replaces = temporary_beside(place), place.exists()
    except OSError as error:
        raise HdbError(f"cannot write {path}: {error.strerror or error}") from error
    try:
        for new in (True, False) if replaces else (True,):
            with write_beside(rehearsal, new) as beside:
                beside.write_bytes(b"rehearsal")
    except HdbError as error:
        raise HdbError(str(error).replace(str(rehearsal), str(path))) from error
    finally:
        with suppress(OSError):
            rehearsal.unlink()


def refuse_file_as_folder(out: Path, instead: str) -> None:
    """Refuse a folder of results that is called as a file is: its name was to be a file's."""
    if not out.is_dir():
        refuse_file_as("a folder", out, WEIGHTS | OTHER_FILES, instead)


def refuse_file_as(use: str, name: Path | str, kinds: Collection[str], instead: str) -> None:
    """Refuse a path, or a text, that is called as a file of these kinds is, but would be used as
    something else."""
    if Path(name).suffix.casefold() in kinds:
        said = name if isinstance(name, Path) else repr(name)
        raise UsageError(f"{said} is named like a file, and would be {use}; {instead}")


def temporary_beside(path: Path) -> Path:
    """Return a free name for a temporary file in the folder of `path`."""
    return path.parent / f".{os.urandom(8).hex()}.tmp"


def flush(path: Path) -> None:
    """Wait until a file is on its disk, where the file system knows how to."""
    try:
        with open(path, "rb+") as file:
            os.fsync(file.fileno())
    except OSError as error:
        if error.errno not in REFUSALS:  # no room, or a broken disk: it is not all there
            raise


def move_to_new(source: Path, path: Path) -> None:
    """Rename a file, or a link, but onto nothing: Taken, told by the file system itself where it
    can link."""
    follow = {"follow_symlinks": False} if os.link in os.supports_follow_symlinks else {}
    try:
        os.link(source, path, **follow)
    except OSError as error:
        if os.path.lexists(path):
            raise Taken(
                f"{path} appeared while this ran and was not replaced; give another name"
            ) from error
        _move_over(source, path)
    else:
        with suppress(OSError):  # what counts is there
            source.unlink()


def _move_over(source: Path, path: Path) -> None:
    """Rename a file, onto another if need be; copy it where the file system cannot rename."""
    try:
        os.replace(source, path)
    except OSError as error:
        if error.errno not in REFUSALS or path.exists():  # half a copy would cost what is there
            raise
        try:
            shutil.copyfile(source, path)
            flush(path)
        except BaseException:
            with suppress(OSError):
                path.unlink()
            raise
        with suppress(OSError):
            source.unlink()


def _permit(path: Path, mode: int) -> None:
    """Set permissions, where the file system has any."""
    with suppress(OSError):
        os.chmod(path, stat.S_IMODE(mode))
