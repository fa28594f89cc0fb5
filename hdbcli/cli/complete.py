"""What the shell offers where an identity, a base model or one of a few words is to be typed.

None of it imports torch, and none may fail: what goes wrong is told by the command itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from registry import store
from registry.errors import HdbError


def words(*choices: str) -> Callable[[str], list[str]]:
    """Make a completion of one of these words."""

    def complete(incomplete: str) -> list[str]:
        return _starting(choices, incomplete)

    return complete


def identities(incomplete: str) -> list[str]:
    """Complete the name of an identity, the last of several with commas between."""
    before, comma, last = incomplete.rpartition(",")
    try:
        return [f"{before}{comma}{name}" for name in _starting(store.names(), last)]
    except HdbError:
        return []


def bases(incomplete: str) -> list[str]:
    """Complete the name of a base model."""
    from registry.plugins import load_registry

    try:
        return _starting(load_registry().names(), incomplete)
    except HdbError:
        return []


def methods(incomplete: str) -> list[str]:
    """Complete the last of several methods of hdb compare."""
    from hdbcli.config import METHOD_NAMES

    before, comma, last = incomplete.rpartition(",")
    return [f"{before}{comma}{name}" for name in _starting(METHOD_NAMES, last)]


def _starting(choices: Iterable[str], incomplete: str) -> list[str]:
    return [each for each in choices if each.startswith(incomplete)]
