"""Find base models and metrics through one door, an entry-point group each, for built-ins too.

Base models that the user added join them there.

An entry point's value is a function that takes `register`, itself a function of one `BaseSpec` (or
`MetricSpec`, in the group `hdb.metrics`):

    [project.entry-points."hdb.models"]
    mine = "my_package:register"

A plug-in is code that runs. `HDB_PLUGINS=""` turns third parties off, `HDB_PLUGINS=a,b` narrows
them to these entry points, `HDB_DEBUG=1` lets the error of a broken one through.
"""

from __future__ import annotations

import difflib
import os
import re
from dataclasses import replace
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Generic, TypeVar

from registry.bases.added import added_bases
from registry.bases.settings import customised, default_base
from registry.errors import HdbError
from registry.metric import MetricSpec
from registry.spec import BaseSpec

Spec = TypeVar("Spec", BaseSpec, MetricSpec)

GROUPS = {BaseSpec: ("hdb.models", "base model"), MetricSpec: ("hdb.metrics", "metric")}
ADDED = "hdb base add"  # the source of what the user added
DISTRIBUTION = "hyperdreambooth"  # entry points of this distribution are built in


class Registry(Generic[Spec]):
    """What was found of one kind, base models or metrics, and what was wrong with the others."""

    def __init__(self, kind: type[Spec]) -> None:
        self.kind: type[Spec] = kind
        self.group, self.noun = GROUPS[kind]
        self.problems: list[str] = []
        self._specs: dict[str, Spec] = {}  # by name without case
        self._sources: dict[str, str] = {}

    def register(self, spec: Spec, source: str) -> None:
        """Add a spec; a name taken already stays with the first and becomes a problem."""
        if not isinstance(spec, self.kind):
            raise HdbError(f"{source} registered {type(spec).__name__}, not a {self.kind.__name__}")
        key = spec.name.casefold()
        if key in self._specs:
            self.problems.append(
                f"{self.noun} {spec.name!r} of {source} is left out: {self._sources[key]} "
                "registered that name first; rename one or narrow HDB_PLUGINS"
            )
            return
        self._specs[key] = spec
        self._sources[key] = source

    def get(self, name: str) -> Spec:
        """Return the spec of that name, in any case; raise HdbError if unknown."""
        found = self._specs.get(name.casefold())
        if found is None:
            raise HdbError(self._unknown(name))
        return found

    def source(self, name: str) -> str:
        """Return who registered a spec: entry point, distribution and version."""
        return self._sources[self.get(name).name.casefold()]

    def names(self) -> list[str]:
        """Return the names, sorted."""
        return [spec.name for spec in self.specs()]

    def specs(self) -> list[Spec]:
        """Return the specs, sorted by name."""
        return [self._specs[key] for key in sorted(self._specs)]

    def _unknown(self, name: str) -> str:
        """Say which names there are, the likely one, and that some plug-ins are missing."""
        if not self._specs:
            text = f"unknown {self.noun} {name!r}: none is installed; install hyperdreambooth"
        else:
            close = difflib.get_close_matches(name.casefold(), self._specs, n=1)
            likely = f"; did you mean {self._specs[close[0]].name!r}?" if close else ""
            text = f"unknown {self.noun} {name!r}{likely} (choose from {', '.join(self.names())})"
        if self.problems:
            text += f"; {len(self.problems)} could not be loaded, see hdb base list"
        return text


def load_registry() -> Registry[BaseSpec]:
    """Discover every base model, and those that the user added; what fails becomes one line
    in `problems`."""
    registry = _discover(Registry(BaseSpec))
    for found in added_bases():
        if isinstance(found, str):
            registry.problems.append(found)
        else:
            registry.register(found, ADDED)
    return registry


def find_base(
    name: str | None = None, targets: str | None = None, hypernetwork: Path | None = None
) -> BaseSpec:
    """Return the spec of a base model, None for the user's default, with what the user set for it;
    with the target set of that name and another hypernetwork, if they are given."""
    spec = customised(load_registry().get(name or default_base()))
    spec = spec.with_targets(targets) if targets else spec
    return replace(spec, hypernetwork=hypernetwork) if hypernetwork else spec


def load_metrics() -> Registry[MetricSpec]:
    """Discover every metric, in the same way."""
    return _discover(Registry(MetricSpec))


def _discover(registry: Registry[Spec]) -> Registry[Spec]:
    wanted = _wanted()
    found = sorted(
        entry_points(group=registry.group), key=lambda e: (not _built_in(e), e.name, _source(e))
    )  # built-ins first: no third party can take their names
    for entry in found:
        if _built_in(entry) or wanted is None or entry.name in wanted:
            _load(registry, entry)
    absent = (wanted or set()) - {entry.name for entry in found}
    for name in sorted(absent - _elsewhere(registry)) if absent else ():
        groups = " or ".join(group for group, _ in GROUPS.values())
        registry.problems.append(f"HDB_PLUGINS asks for {name!r}: no such entry point of {groups}")
    return registry


def _elsewhere(registry: Registry[Spec]) -> set[str]:
    """Return the names of the entry points in the other groups, which HDB_PLUGINS may mean."""
    others = (group for group, _ in GROUPS.values() if group != registry.group)
    return {entry.name for group in others for entry in entry_points(group=group)}


def _load(registry: Registry[Spec], entry: EntryPoint) -> None:
    """Import a plug-in and let it register."""
    source = _source(entry)
    try:
        entry.load()(lambda spec: registry.register(spec, source))
    except (Exception, SystemExit) as error:
        # The one broad catch: third-party code runs here and may raise anything, and a broken
        # plug-in must not take `hdb --help` or the other base models with it.
        if os.environ.get("HDB_DEBUG", "") not in ("", "0"):
            raise
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        registry.problems.append(f"plug-in {source} is broken: {reason}; HDB_DEBUG=1 shows where")


def _wanted() -> set[str] | None:
    """Return the third-party entry points to load, None for all."""
    text = os.environ.get("HDB_PLUGINS")
    return None if text is None else {part.strip() for part in text.split(",") if part.strip()}


def _distribution(entry: EntryPoint) -> tuple[str, str]:
    """Return name and version of the distribution that an entry point comes from."""
    if entry.dist is None:
        return "", ""
    try:
        return entry.dist.name or "", entry.dist.version or ""
    except (KeyError, TypeError, ValueError, OSError):  # a distribution without its METADATA
        return "", ""


def _built_in(entry: EntryPoint) -> bool:
    """Say whether an entry point belongs to this very distribution."""
    return re.sub(r"[-_.]+", "-", _distribution(entry)[0]).lower() == DISTRIBUTION


def _source(entry: EntryPoint) -> str:
    """Name an entry point so that the user knows what to uninstall."""
    name, version = _distribution(entry)
    return f"{entry.value} ({name or 'unknown distribution'} {version}".rstrip() + ")"
