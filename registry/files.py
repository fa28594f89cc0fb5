"""Write files whole or not at all."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from registry.errors import RegistryError


@contextmanager
def write_beside(path: Path, new: bool = False) -> Iterator[Path]:
    """Yield a temporary file in the folder of `path`, and rename it to `path` at the end.

    The block should do nothing but write: after any exception, Ctrl-C included, the temporary
    file is deleted and an older `path` is untouched. An OSError, in the block too, becomes a
    RegistryError, and so does a `path` that is there by then although it is to be `new`, or that is
    a device or a pipe. The temporary name starts with a dot, which no identity's name does.
    """
    temporary = path.parent / f".{os.urandom(8).hex()}.tmp"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists() and not path.is_file():  # root may replace /dev/null for everybody
            raise RegistryError(f"cannot write {path}: it is no plain file; give another name")
        with open(temporary, "xb") as file:  # here, so that an unwritable folder is told first
            mode = os.fstat(file.fileno()).st_mode
        if path.exists():  # whom it was hidden from does not see the new one either
            mode = path.stat().st_mode
            os.chmod(temporary, stat.S_IMODE(mode) | stat.S_IRUSR | stat.S_IWUSR)
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.chmod(temporary, stat.S_IMODE(mode))  # a library may have put a file of its own there
        (_move_to_new if new else os.replace)(temporary, path)
    except BaseException as error:
        with suppress(OSError):
            temporary.unlink()
        if isinstance(error, OSError):
            raise RegistryError(f"cannot write {path}: {error.strerror or error}") from error
        raise


def _move_to_new(temporary: Path, path: Path) -> None:
    """Rename a file, but onto nothing: RegistryError, told by the file system itself where it can
    link."""
    try:
        os.link(temporary, path)
    except OSError as error:
        if os.path.lexists(path):
            raise RegistryError(
                f"{path} appeared while this ran and was not replaced; give another name"
            ) from error
        os.replace(temporary, path)
    else:
        temporary.unlink()
