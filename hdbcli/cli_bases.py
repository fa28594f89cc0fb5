"""Commands about base models."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hdbcli import render
from hdbcli.cli_options import (
    Json,
    bases,
    new_app,
    open_on,
    spec_of,
)
from hdbcli.errors import HdbError

if TYPE_CHECKING:
    pass


base_app = new_app("The base models that hdb knows.")


@base_app.command("list")
def base_list(as_json: Json = False) -> None:
    """List the base models, and the plug-ins that could not be loaded."""
    registry = bases()
    for problem in registry.problems:
        render.note(f"warning: {problem}")
    specs = registry.specs()
    if as_json:
        render.document([render.base_facts(s, registry.source(s.name)) for s in specs])
    else:
        rows = [(s.name, s.family, s.resolution, s.licence, s.summary) for s in specs]
        render.table(("name", "family", "px", "licence", "summary"), rows)


@base_app.command("show")
def base_show(
    name: Annotated[str, typer.Argument(help="Name of a base model.")], as_json: Json = False
) -> None:
    """Show what a base model offers."""
    values = render.base_facts(spec_of(name), bases().source(name))
    (render.document if as_json else render.facts)(values)


@base_app.command("set-hypernetwork")
def base_set_hypernetwork(
    name: Annotated[str, typer.Argument(help="Name of a base model.")],
    file: Annotated[
        Path | None, typer.Argument(help="File made by hdb train hypernetwork.")
    ] = None,
    reset: Annotated[bool, typer.Option("--reset", help="Go back to the base's own.")] = False,
) -> None:
    """Let a base model predict with another hypernetwork, after checking that it fits."""
    from registry.settings import set_hypernetwork

    if reset == (file is not None):
        raise HdbError("give either the file of a hypernetwork or --reset")
    spec = bases().get(name)
    if file:
        from hdbcli.base import load_predictor

        load_predictor(open_on(name, "cpu", file))
    set_hypernetwork(spec.name, file)
    render.say(f"{spec.name} predicts with {file or 'its own hypernetwork'}")
