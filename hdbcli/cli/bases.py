"""Commands about base models."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hdbcli.cli import complete, render
from hdbcli.cli.boundary import new_app
from hdbcli.cli.options import Json, added_of, bases
from registry.errors import HdbError, UsageError
from registry.store import check_name, made_on

if TYPE_CHECKING:
    from registry.plugins import Registry
    from registry.spec import BaseSpec

base_app = new_app("The base models that hdb knows.")

NAMED = 5  # identities in a message

Name = Annotated[str, typer.Argument(autocompletion=complete.bases, help="Name of a base model.")]


@base_app.command("add")
def base_add(
    name: Annotated[str, typer.Argument(help="What to call it.")],
    source: Annotated[
        str,
        typer.Argument(
            help="A diffusers folder, an original single .safetensors file, or a model of the "
            "Hugging Face hub, such as org/model."
        ),
    ],
    revision: Annotated[
        str | None, typer.Option(help="Branch, tag or commit of a model of the hub.")
    ] = None,
    prediction: Annotated[
        str | None,
        typer.Option(
            autocompletion=complete.words("epsilon", "v"),
            help="epsilon or v, where a single file predicts what is not usual for it.",
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Add a base model of Stable Diffusion 1.x, 2.x or XL; its files stay where they are."""
    from registry.bases.hub import locate
    from registry.plugins import find_base

    registry = bases()
    if check_name(name).casefold() in {known.casefold() for known in registry.names()}:
        source, free = registry.source(name), added_of(name) is not None
        rest = f", or hdb base rm {name} first" if free else ""
        raise HdbError(
            f"there is a base model {name} already, of {source}; choose another name{rest}"
        )
    path, origin = locate(source, revision)
    from hdbcli.model.add import adopt

    with render.progress(load=1, hash=1) as tell:
        added = adopt(name, path, origin, prediction, tell)
    spec = find_base(name)

    def show() -> None:
        render.say(f"{name}: {spec.summary}, {added.resolution} px")
        render.note(
            f"hint: it has no hypernetwork yet, so hdb new --base {name} takes longer; "
            f"train one and: hdb base set-hypernetwork {name} FILE"
        )

    render.result(render.base_facts(spec, bases().source(name), added), show)


@base_app.command("list")
def base_list(as_json: Json = False) -> None:
    """List the base models, and the plug-ins that could not be loaded."""
    from registry.bases.settings import default_base

    registry = bases()
    for problem in registry.problems:
        render.note(f"warning: {problem}")
    specs, default = registry.specs(), default_base().casefold()
    if as_json:
        found = [{**_facts(s, registry), "default": s.name.casefold() == default} for s in specs]
        render.document({"bases": found, "problems": registry.problems})
        return
    rows = []
    for s in specs:
        star = "*" if s.name.casefold() == default else ""
        rows.append((s.name, star, s.family, s.resolution, s.licence, s.summary))
    render.table(("name", "", "family", "px", "licence", "summary"), rows)


@base_app.command("show")
def base_show(name: Name, as_json: Json = False) -> None:
    """Show what a base model offers."""
    from registry.plugins import find_base

    values = render.base_facts(find_base(name), bases().source(name), added_of(name))
    render.result(values, lambda: render.facts(values))


@base_app.command("default")
def base_default(
    name: Annotated[
        str | None,
        typer.Argument(
            autocompletion=complete.bases,
            help="Name of a base model; without one, say which it is.",
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Choose the base model that commands use without --base."""
    from registry.bases.settings import default_base, set_default

    if name:
        set_default(bases().get(name).name)
    chosen = default_base()
    render.result({"default": chosen}, chosen)


@base_app.command("rm")
def base_rm(name: Name, as_json: Json = False) -> None:
    """Forget a base model that was added; its files stay where they are."""
    from registry.bases.added import forget

    _check_known(name)
    added = forget(name)
    shown = f"forgot {added.name}; its files stay at {added.path}"
    render.result({"name": added.name, "path": added.path}, shown)
    if needed := made_on(added.name):
        more = f" and {len(needed) - NAMED} more" if len(needed) > NAMED else ""
        render.note(
            f"note: {', '.join(needed[:NAMED])}{more} need it to be drawn: "
            f"hdb base add {added.name} {added.origin.partition('@')[0] or added.path}"
        )


@base_app.command("verify")
def base_verify(name: Name, as_json: Json = False) -> None:
    """Read all files of an added base model again, and refuse it if one has changed."""
    from registry.bases.added import verify

    _check_known(name)
    added = verify(name)
    size = sum(mark.bytes for mark in added.files.values())
    facts = {"name": added.name, "path": added.path, "digest": added.digest}
    shown = f"{added.name}: {len(added.files)} files, {size:,} bytes, as they were added"
    render.result({**facts, "files": len(added.files), "bytes": size}, shown)


@base_app.command("set-hypernetwork")
def base_set_hypernetwork(
    name: Name,
    file: Annotated[
        Path | None, typer.Argument(help="File made by hdb train hypernetwork.")
    ] = None,
    reset: Annotated[bool, typer.Option("--reset", help="Go back to the base's own.")] = False,
    as_json: Json = False,
) -> None:
    """Let a base model predict with another hypernetwork, after checking that it fits."""
    from registry.bases.settings import set_hypernetwork
    from registry.checkpoints.safetensors import LARGEST, read_header

    if reset == (file is not None):
        raise UsageError("give either the file of a hypernetwork or --reset")
    spec = bases().get(name)
    if file:
        if read_header(file, LARGEST).metadata.get("hdb.kind") != "hypernetwork":
            raise HdbError(
                f"{file} is not a hypernetwork; give what hdb train hypernetwork has made"
            )
        from hdbcli.model.base import load_base, load_predictor
        from hdbcli.model.hypernetwork_file import targets_of
        from registry.plugins import find_base

        chosen = find_base(name, None, file)
        load_predictor(load_base(chosen, "cpu", targets_digest=targets_of(file)))
    set_hypernetwork(spec.name, file)
    shown = f"{spec.name} predicts with {file or 'its own hypernetwork'}"
    render.result({"name": spec.name, "hypernetwork": file}, shown)


def _check_known(name: str) -> None:
    """Raise HdbError for a name that no base has, with the likely one."""
    if added_of(name) is None:  # else known, even if this hdb cannot work with it
        bases().get(name)


def _facts(spec: BaseSpec, registry: Registry) -> dict[str, Any]:
    """Return a base model's facts; settings that cannot be read are among the problems already."""
    from registry.bases.settings import customised

    source, added = registry.source(spec.name), None
    with suppress(HdbError):
        spec, added = customised(spec), added_of(spec.name)
    return render.base_facts(spec, source, added)
