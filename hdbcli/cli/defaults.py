"""A user's own defaults of options, as Click takes them: commands, their options, and values."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import typer

from registry.errors import HdbError

SAID = {"help", "version", "json", "yes", "force", "from"}  # what is said each time, or not at all


def default_map(group: Any, values: Mapping[str, Any], file: Path) -> dict[str, Any]:
    """Turn the values of a file into the defaults of a group of commands.

    A table holds those of the command that it is named after, by long options; what stands outside
    of tables goes to every command that has that option. HdbError for a key that nothing has, and
    for a value that the option would refuse.
    """
    return _filled(group, values, {}, file, "")[0]


def _filled(
    command: Any, values: Mapping[str, Any], common: Mapping[str, Any], file: Path, words: str
) -> tuple[dict[str, Any], set[str]]:
    """Return the defaults of a command, or of all in a group, and the options there are."""
    tables = {key: value for key, value in values.items() if isinstance(value, Mapping)}
    plain = {key: value for key, value in values.items() if key not in tables}
    where = f"[{words.strip()}] " if words else ""
    if hasattr(command, "commands"):
        _refuse_unknown(tables.keys() - command.commands.keys(), f"{file}: {where}no command")
        found, known = {}, set()
        for name, child in command.commands.items():
            under = tables.get(name, {})
            found[name], there = _filled(child, under, {**common, **plain}, file, f"{words} {name}")
            known |= there
        _refuse_unknown(plain.keys() - known, f"{file}: {where}no option")
        return found, known
    options = {
        word.removeprefix("--"): option
        for option in command.params
        for word in (*option.opts, *option.secondary_opts)
        if word.startswith("--") and word.removeprefix("--") not in SAID
    }
    _refuse_unknown(values.keys() - options.keys(), f"{file}: {where}no option")
    own = {key: value for key, value in {**common, **plain}.items() if key in options}
    for key, value in own.items():
        _check(options[key], value, f"{file}: {where if key in plain else ''}{key}")
    return {options[key].name: value for key, value in own.items()}, set(options)


def _check(option: Any, value: Any, where: str) -> None:
    """Raise HdbError for a value that an option would refuse on the command line."""
    try:
        if isinstance(value, bool) != option.is_flag:
            raise typer.BadParameter("true or false is for options without a value, and theirs")
        option.type_cast_value(None, value)
    except (typer.BadParameter, TypeError, ValueError) as error:
        said = getattr(error, "message", error)
        raise HdbError(f"{where} cannot be {value!r}: {said}") from error


def _refuse_unknown(names: set[str], what: str) -> None:
    if names:
        raise HdbError(f"{what} is called {sorted(names)[0]!r} there; mend it, or take it out")
