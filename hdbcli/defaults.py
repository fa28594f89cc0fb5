"""A user's own defaults: `config.toml` in the store or the user's folder of settings."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from registry import store
from registry.errors import HdbError


def path() -> Path:
    """Return where the file lies, whether it is there or not."""
    return store.root("config") / "config.toml"


def read() -> dict[str, Any]:
    """Return what the file says, nothing if there is none; HdbError for what is no TOML."""
    file = path()
    if not file.exists():
        return {}
    if sys.version_info >= (3, 11):  # to import it takes time, and hardly anybody has the file
        import tomllib
    else:
        import tomli as tomllib
    try:
        return tomllib.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise HdbError(f"{file} cannot be read ({error}); mend it, or take it away") from error
