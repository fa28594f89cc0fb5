"""What a user set for a base model: one small JSON file each, `bases/NAME.json` in the store."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from registry.errors import HdbError
from registry.files import write_beside
from registry.spec import BaseSpec
from registry.store import check_name, root

FORMAT = 1
DEFAULT = "tiny"  # unless the user chose another


@dataclass(frozen=True)
class Mark:
    """What a file was when its base was added."""

    bytes: int
    modified: int  # nanoseconds
    sha256: str


@dataclass(frozen=True)
class Added:
    """A base model that the user added: where its files lie, which stay theirs, and what it is."""

    name: str
    path: str  # absolute; a folder, or a single file
    family: str
    prediction: str
    resolution: int
    digest: str  # of the targeted weights as float16; identities carry it too
    files: Mapping[str, Mark]  # by path, from the folder's or the single file's folder
    origin: str = ""  # hub id and commit, where it was downloaded


@dataclass(frozen=True)
class Settings:
    """All that is set for one base model; nothing, where there is no file."""

    hypernetwork: str | None = None  # absolute path
    default: bool = False  # what commands use without --base
    added: Added | None = None


def settings_path(base: str) -> Path:
    """Return where the settings of a base lie; HdbError for what is not a name."""
    return root() / "bases" / f"{check_name(base).casefold()}.json"


def read_settings(path: Path) -> Settings:
    """Read one file; HdbError if it cannot be read."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return Settings()
    except (OSError, ValueError) as error:
        raise HdbError(f"cannot read {path} ({error}); delete it to start again") from error
    try:
        return _parse(json.loads(text))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise HdbError(
            f"{path} holds no settings of a base model ({error}); delete it to start again"
        ) from error


def write_settings(base: str, settings: Settings) -> None:
    """Keep the settings of a base; without any there is no file."""
    path = settings_path(base)
    if settings == Settings():
        path.unlink(missing_ok=True)
        return
    with write_beside(path) as beside:
        beside.write_text(json.dumps({"format": FORMAT, **asdict(settings)}), encoding="utf-8")


def all_settings() -> Iterator[Path]:
    """Find the files of all bases that something is set for, sorted."""
    with suppress(FileNotFoundError):
        yield from sorted((root() / "bases").glob("[!.]*.json"))


def customised(spec: BaseSpec) -> BaseSpec:
    """Return the spec as the user wants it; HdbError if the settings cannot be read."""
    file = read_settings(settings_path(spec.name)).hypernetwork
    return replace(spec, hypernetwork=Path(file)) if file else spec


def predicts(base: str) -> str | None:
    """Return what an added base was found or said to predict; None for what others bring."""
    added = read_settings(settings_path(base)).added
    return added.prediction if added else None


def set_hypernetwork(base: str, file: Path | None) -> None:
    """Use `file` as the hypernetwork of a base from now on; None goes back to its own.

    Going back mends settings that cannot be read, as long as the base was not added by them.
    """
    try:
        settings = read_settings(settings_path(base))
    except HdbError:
        if file is not None:
            raise
        settings = Settings()
    write_settings(base, replace(settings, hypernetwork=str(file.absolute()) if file else None))


def default_base() -> str:
    """Return the name of the base that commands use without --base."""
    for path in all_settings():
        with suppress(HdbError):  # its own commands tell what is wrong with it
            settings = read_settings(path)
            if settings.default:
                return settings.added.name if settings.added else path.stem
    return DEFAULT


def set_default(base: str) -> None:
    """Let commands use this base without --base; cut off half-way, they use `tiny`."""
    for path in all_settings():
        settings = read_settings(path)
        if settings.default:
            write_settings(path.stem, replace(settings, default=False))
    if base != DEFAULT:
        settings = read_settings(settings_path(base))
        write_settings(base, replace(settings, default=True))


def _parse(values: Any) -> Settings:
    """Check every field; raise what a wrong one raises."""
    if values["format"] != FORMAT:
        raise ValueError(f"format {values['format']}, this hdb reads {FORMAT}")
    hypernetwork, default = values.get("hypernetwork"), values.get("default", False)
    if not isinstance(hypernetwork, str | None) or not isinstance(default, bool):
        raise ValueError("hypernetwork is not a path, or default not true or false")
    added = values.get("added")
    if added is None:
        return Settings(hypernetwork, default)
    marks = {}
    for name, mark in added["files"].items():
        marks[name] = Mark(int(mark["bytes"]), int(mark["modified"]), str(mark["sha256"]))
    texts = {
        key: added[key] for key in ("name", "path", "family", "prediction", "digest", "origin")
    }
    if not all(isinstance(text, str) for text in texts.values()):
        raise ValueError("a field of what was added is not text")
    return Settings(
        hypernetwork, default, Added(**texts, resolution=int(added["resolution"]), files=marks)
    )
