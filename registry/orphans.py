"""Find what interrupted runs and uninstalled base models left in the store; never an identity."""

from __future__ import annotations

import os
import re
import stat
import time
from collections.abc import Collection, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from registry.errors import HdbError
from registry.store import folder, root

TEMPORARY = re.compile(r"\.[0-9a-f]{16}\.tmp")  # the names that `write_beside` gives
WRITING = 60.0  # seconds: a younger one may be in the writing


@dataclass(frozen=True)
class Orphan:
    """One file that nothing needs, and why."""

    path: Path
    bytes: int
    reason: str


def temporaries(older: float = WRITING, *places: Path) -> list[Orphan]:
    """Return temporary files of these folders, or else of the store, that were last written `older`
    seconds ago or more."""
    before = time.time() - older
    places = places or (folder(), root() / "bases")
    return [
        Orphan(path, state.st_size, "temporary file of an interrupted run")
        for place in places
        for path, state in _files(place)
        if TEMPORARY.fullmatch(path.name) and state.st_mtime <= before
    ]


def settings_without_base(bases: Collection[str]) -> list[Orphan]:
    """Return the settings of base models that are not among `bases`, by name."""
    known = {f"{name.casefold()}.json" for name in bases}
    return [
        Orphan(path, state.st_size, "settings of a base model that is not installed")
        for path, state in _files(root() / "bases")
        if path.suffix == ".json" and path.name not in known
    ]


def delete(orphan: Orphan) -> None:
    """Delete one; that it is gone already is fine."""
    try:
        orphan.path.unlink(missing_ok=True)
    except OSError as error:
        raise HdbError(f"cannot remove {orphan.path}: {error.strerror or error}") from error


def _files(place: Path) -> Iterator[tuple[Path, os.stat_result]]:
    """Yield the plain files of a folder, by name; links and folders are not hdb's."""
    try:
        names = sorted(os.listdir(place))
    except FileNotFoundError:
        return
    except OSError as error:
        raise HdbError(f"cannot read {place}: {error.strerror or error}") from error
    for name in names:
        with suppress(FileNotFoundError):  # a run that was writing has finished
            state = (place / name).lstat()
            if stat.S_ISREG(state.st_mode):
                yield place / name, state
