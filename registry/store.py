"""The local registry of identities: a folder of `NAME.safetensors`, with no index to disagree.

The file is the truth: copying one in adds an identity, deleting one removes it. `path_of` is the
only way from a name to a path. Everything here runs without torch, so that lists are instant.
"""

from __future__ import annotations

import difflib
import os
import re
import unicodedata
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from registry.checkpoints.safetensors import read_header
from registry.errors import HdbError, UsageError
from registry.files import (
    WEIGHTS,
    check_writable,
    move_to_new,
    refuse_file_as_folder,
    write_beside,
)
from registry.identity_facts import Facts, Layout, read_content, read_facts
from registry.spec import NAME_PATTERN

SUFFIX = ".safetensors"

# Windows refuses these as file names, with any extension; refused everywhere, as files travel.
RESERVED = {"con", "prn", "aux", "nul"} | {f"{p}{n}" for p in ("com", "lpt") for n in range(10)}

# Letters of people's names that Unicode does not take apart.
FOLDED = str.maketrans(
    {"ß": "ss", "æ": "ae", "Æ": "Ae", "œ": "oe", "Œ": "Oe", "ø": "o", "Ø": "O", "ł": "l"}
    | {"Ł": "L", "đ": "d", "Đ": "D", "ð": "d", "Ð": "D", "þ": "th", "Þ": "Th", "\u0131": "i"}
)


@dataclass(frozen=True)
class Entry:
    """One identity as `hdb list` shows it; `problem` says why a file has no facts."""

    name: str
    path: Path
    bytes: int
    facts: Facts | None
    layout: Layout | None
    problem: str | None = None

    def as_dict(self) -> dict[str, Any]:
        """Return a flat table for JSON, with None for what a file with a problem does not say."""
        known: dict[str, Any] = {}
        for kind, part in ((Facts, self.facts), (Layout, self.layout)):
            known |= vars(part) if part else dict.fromkeys(kind.__dataclass_fields__)
        return {
            "name": self.name,
            "bytes": self.bytes,
            "path": str(self.path),
            "numbers": self.layout.numbers if self.layout else None,
            **known,
            "problem": self.problem,
        }


def root(kind: str = "data") -> Path:
    """Return the folder of all that hdb keeps: `HDB_HOME`, else the user's folder of that kind,
    data, config or cache; HdbError for a user who has none."""
    home = os.environ.get("HDB_HOME")
    if home:
        return Path(os.path.abspath(os.path.expanduser(home)))
    import platformdirs  # not needed where HDB_HOME is set, and a list has no time to lose

    try:
        return Path(getattr(platformdirs, f"user_{kind}_dir")("hdb", appauthor=False))
    except RuntimeError as error:
        raise HdbError(
            "this user has no home folder; set HDB_HOME to the folder where hdb is to keep its data"
        ) from error


def folder() -> Path:
    """Return the folder of the identities; it may not exist yet."""
    return root() / "identities"


def check_name(name: str) -> str:
    """Return a name that is safe as a file's name on every system; raise HdbError."""
    if not re.fullmatch(NAME_PATTERN, name):
        shown = name if len(name) <= 80 else name[:77] + "..."
        raise UsageError(
            f"{shown!r} is not a valid name; use 1 to 64 of A-Z a-z 0-9 _ . - and start with a "
            "letter, a digit or _"
        )
    if name.endswith(".") or ".." in name:
        raise UsageError(f"{name!r} is not a valid name; drop the dot at its end or the '..'")
    if name.split(".")[0].casefold() in RESERVED:
        raise UsageError(f"{name!r} is reserved on some systems; choose another name")
    if name.casefold().endswith(SUFFIX):
        raise UsageError(f"{name!r} reads like a file; drop {SUFFIX} from the name")
    return name


def name_from_stem(stem: str) -> str:
    """Make a valid name of any file stem: "José García (2)" becomes "Jose-Garcia-2"."""
    text = unicodedata.normalize("NFKD", stem.translate(FOLDED))
    text = re.sub(r"[^A-Za-z0-9_.]+", "-", text.encode("ascii", "ignore").decode())
    text = re.sub(r"[-.]*\.[-.]*", ".", text).strip("-.")
    head, dot, rest = text.partition(".")
    if head.casefold() in RESERVED:
        head += "-face"
    text = (head + dot + rest)[:64].rstrip("-.")
    while text.casefold().endswith(SUFFIX):
        text = text[: -len(SUFFIX)].rstrip("-.")
    return check_name(text or "face")


def shown(path: Path) -> str:
    """Return a file's stem as text for a terminal, a picture or a header: of bytes that are no
    UTF-8, and of control characters, a sign alone."""
    return "".join(c if c.isprintable() else "\ufffd" for c in path.stem)


def path_of(name: str) -> Path:
    """Return the path of an identity, existing or not; a file that differs in case is the same."""
    wanted = (check_name(name) + SUFFIX).casefold()
    same = [path for path in _files() if path.name.casefold() == wanted and _is_valid(path.stem)]
    exact = [path for path in same if path.stem == name]
    return next(iter(exact + same), folder() / (name + SUFFIX))


def exists(name: str) -> bool:
    """Say whether the registry has an identity of that name, in any case."""
    return os.path.lexists(path_of(name))


def names() -> list[str]:
    """Return the names in the registry, sorted without case; raise HdbError if unreadable."""
    return [path.stem for path in _files() if _is_valid(path.stem)]


def resolve(name_or_file: str | os.PathLike[str]) -> Path:
    """Return the path of an identity given by name, or by a path that ends in .safetensors."""
    text = os.fspath(name_or_file)
    if text.casefold().endswith(SUFFIX):
        if os.path.isfile(text):
            return Path(text)
        stem = os.path.basename(text)[: -len(SUFFIX)]
        hint = f"; the registry has {stem!r}" if _is_valid(stem) and exists(stem) else ""
        raise HdbError(f"no such file: {text!r}{hint}")
    path = path_of(text)
    if not os.path.lexists(path):
        raise _unknown(text)
    return path


def remove(name: str) -> Path:
    """Delete an identity and return the path it had; raise HdbError if unknown."""
    path = path_of(name)
    try:
        path.unlink()
    except FileNotFoundError as error:
        raise _unknown(name) from error
    except OSError as error:
        raise HdbError(f"cannot remove {path}: {error.strerror or error}") from error
    return path


def describe(path: Path) -> Entry:
    """Return what an identity file says of itself, from its header; raise HdbError."""
    header = read_header(path)
    return Entry(path.stem, path, header.bytes, *read_facts(path, header))


def check(path: Path) -> None:
    """Raise HdbError for a file that is not an identity, or is not what it was when written."""
    header = read_header(path)
    read_facts(path, header)
    read_content(path, header)


def copy(source: Path, target: Path, new: bool = False) -> Path:
    """Copy an identity's bytes; `target` appears whole or not at all, and takes the place of
    nothing if it is to be `new`."""
    with write_beside(target, new) as beside:
        beside.write_bytes(source.read_bytes())
    return target


def rename(source: Path, target: Path, new: bool = False) -> Path:
    """Give an identity's file another name, which takes the place of nothing if it is to
    be `new`."""
    try:
        (move_to_new if new else os.replace)(source, target)
    except OSError as error:
        raise HdbError(f"cannot rename {source}: {error.strerror or error}") from error
    return target


def stamp(path: Path) -> tuple[int, int, int] | None:
    """Return what changes when a file does; None if it is gone."""
    try:
        facts = path.stat()
    except OSError:
        return None
    return facts.st_ino, facts.st_mtime_ns, facts.st_size


def summary(path: Path) -> dict[str, Any]:
    """Return `describe` as a flat table for JSON."""
    return describe(path).as_dict()


def entries() -> list[Entry]:
    """Return every identity in the registry, sorted; a bad file becomes an entry with a problem."""
    found = []
    for path in _files():
        try:
            if not _is_valid(path.stem):
                raise HdbError(f"{path} has no valid name; rename the file")
            found.append(describe(path))
        except HdbError as error:
            size = 0
            with suppress(OSError):
                size = path.lstat().st_size
            found.append(Entry(path.stem, path, size, None, None, str(error)))
    return found


def made_on(base: str) -> list[str]:
    """Name the identities that were made on a base model."""
    base = base.casefold()
    return [e.name for e in entries() if e.facts and e.facts.base.casefold() == base]


def composed_of(name: str) -> list[str]:
    """Name the identities whose lineage says that they were made of `name`."""
    whole = re.compile(rf"composed of (.* )?{re.escape(name)}( \+ .*)?", re.IGNORECASE)
    return [
        entry.name
        for entry in entries()
        if entry.facts and any(whole.fullmatch(line) for line in entry.facts.lineage)
    ]


def check_output(out: Path, *inputs: Path) -> None:
    """Refuse an output that is an input, or lies among the identities: it would take their place.

    Then refuse one that cannot be written, before any work.
    """
    if any(out.exists() and path.exists() and out.samefile(path) for path in inputs):
        raise HdbError(f"{out} is the input file; give another file")
    check_among(out)
    check_writable(out)


def check_weights(out: Path, *inputs: Path) -> None:
    """Refuse what `check_output` refuses, and weights that are called as another tool's are, which
    would take them for a pickle."""
    if out.suffix.casefold() in WEIGHTS - {SUFFIX}:
        raise UsageError(f"{out} is not named {SUFFIX}, the kind of weights that hdb writes")
    check_output(out, *inputs)


def check_picture(out: Path, *inputs: Path) -> None:
    """Refuse what `check_output` refuses, and a picture that is not called .png."""
    check_output(out, *inputs)
    if out.suffix.lower() != ".png":
        raise UsageError(f"{out} is not named .png, the kind of picture that hdb draws")


def check_folder(out: Path) -> None:
    """Refuse a folder of results that is a file, or in which nothing can be written."""
    place = out.absolute()
    while not place.exists():
        place = place.parent
    if not place.is_dir():
        raise HdbError(f"{place} is a file; give a folder")
    refuse_file_as_folder(out, "give a folder")
    check_among(out)
    check_output(place / "results")


def check_among(out: Path) -> None:
    """Refuse an output among the identities of the store, where it would pass for one of them."""
    if folder().resolve() in (out.resolve(), *out.resolve().parents):
        raise HdbError(f"{out} lies among the identities of the store; give another place")


def _files() -> Sequence[Path]:
    """Return the files that may be identities, sorted without case; temporary ones start dotted."""
    here = folder()
    try:
        found = [n for n in os.listdir(here) if n.casefold().endswith(SUFFIX) and n[0] != "."]
    except FileNotFoundError:
        return []
    except OSError as error:
        raise HdbError(
            f"cannot read {here}: {error.strerror or error}; set HDB_HOME to another folder"
        ) from error
    return [here / name for name in sorted(found, key=lambda n: (n.casefold(), n))]


def _is_valid(name: str) -> bool:
    """Say whether `check_name` accepts a name."""
    try:
        check_name(name)
    except HdbError:
        return False
    return True


def _unknown(name: str) -> HdbError:
    """Make the error of a name that is not in the registry, with the likely one."""
    known = {known.casefold(): known for known in names()}
    if not known:
        return HdbError(f"unknown identity {name!r}: there is none yet; make one with hdb new")
    close = difflib.get_close_matches(name.casefold(), known, n=1)
    likely = f"; did you mean {known[close[0]]!r}?" if close else "; hdb list shows all"
    return HdbError(f"unknown identity {name!r}{likely}")
