"""The command that examines the installation."""

from __future__ import annotations

from typing import Any

import typer

from hdbcli.cli import render
from hdbcli.cli.options import Json


def doctor(as_json: Json = False) -> None:
    """Examine the installation: libraries, devices, base models, plug-ins, store and caches.

    The exit code is 1 only if something is broken that hdb needs. Nothing is changed.
    """
    from hdbcli.doctor import BROKEN, examine

    checks = list(examine())
    broken = [check for check in checks if check.state == BROKEN]
    if as_json:
        sections: dict[str, Any] = {"ok": not broken}
        for check in checks:
            sections.setdefault(check.section, []).append(check.as_dict())
        render.document(sections)
    else:
        rows = [(check.section, check.name, check.state, check.found) for check in checks]
        render.table(("", "", "state", "found"), rows)
    if broken:
        names = ", ".join(check.name for check in broken)
        render.note(f"error: hdb needs what is broken: {names}")
        raise typer.Exit(1)
