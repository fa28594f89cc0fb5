"""Open what a user names as a photo: a file, a pipe, or standard input as `-`."""

from __future__ import annotations

import io
import os
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from registry.errors import HdbError, UsageError

STDIN = "-"
KINDS = "JPEG, PNG, WebP, HEIC, AVIF, TIFF, GIF or BMP"
LARGEST_STREAM = 2**29  # bytes: a pipe has no size to check before it is read

# Two letters at least, since C:/ is a drive. A Path has made one slash of two.
_URL = re.compile(r"(?:[a-z][a-z0-9+.-]+:/|data:)", re.IGNORECASE)


def refuse_url(path: Path) -> None:
    """Raise HdbError if the path is a URL: hdb never opens a connection for a photo."""
    text = str(path)
    if _URL.match(text) and not os.path.exists(path):
        shown = re.sub(":/+", "://", text, count=1)[:100]
        if text.lower().startswith("file:"):
            raise UsageError(f"{shown} is a URL; give the path of the file without file://")
        raise UsageError(
            f"{shown} is a URL, and hdb does not download; save the photo first, "
            "or pipe it in: curl -L URL | hdb new - NAME"
        )


def check_photos(photos: Sequence[Path]) -> None:
    """Refuse URLs, and standard input twice, before any work."""
    for each in photos:
        refuse_url(each)
    if [str(each) for each in photos].count(STDIN) > 1:
        raise UsageError("standard input holds one photo; give - once")


def shown(path: Path) -> str:
    """Return what a message calls the photo."""
    return "standard input" if str(path) == STDIN else str(path)


@contextmanager
def opened(path: Path) -> Iterator[BinaryIO]:
    """Open a photo for reading and seeking; raise HdbError for what is not a file or is empty.

    OSError passes through where the file system fails, for the caller to tell.
    """
    refuse_url(path)
    if str(path) == STDIN:
        if sys.stdin is None or sys.stdin.isatty():
            raise HdbError(
                "- is standard input, which is a terminal; pipe a photo in: hdb new - NAME < PHOTO"
            )
        yield _whole(sys.stdin.buffer, path)
        return
    try:
        path.stat()
    except FileNotFoundError:
        raise HdbError(f"{path}: no such file; check the path of the photo") from None
    if path.is_fifo():
        with path.open("rb") as pipe:
            yield _whole(pipe, path)
    elif not path.is_file():
        raise HdbError(f"{path} is not a file; give one photo ({KINDS})")
    elif not path.stat().st_size:
        raise HdbError(f"{path} is empty (0 bytes); copy or export the photo again")
    else:
        with path.open("rb") as file:
            yield file


def _whole(stream: BinaryIO, path: Path) -> BinaryIO:
    content = stream.read(LARGEST_STREAM + 1)
    if not content:
        raise HdbError(f"{shown(path)} is empty (0 bytes); pipe one photo in, once")
    if len(content) > LARGEST_STREAM:
        raise HdbError(
            f"{shown(path)} has over {LARGEST_STREAM // 2**20} MiB, more than a photo; "
            "scale it down"
        )
    return io.BytesIO(content)
