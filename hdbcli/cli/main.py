"""The command line: commands that make, draw and keep identities, and the doors to the others."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hdbcli import __version__
from hdbcli.cli import render
from hdbcli.cli.algebra import compose, export, inspect, merge, relax, shrink
from hdbcli.cli.bases import base_app
from hdbcli.cli.boundary import Boundary, ask, new_app, only_asked
from hdbcli.cli.complete import identities
from hdbcli.cli.defaults import default_map
from hdbcli.cli.measure import bench, compare, doctor, score
from hdbcli.cli.options import (
    AsPicture,
    BaseName,
    Count,
    CropFile,
    Device,
    FaceNumber,
    FirstSeed,
    Force,
    Grid,
    Guidance,
    Html,
    Identity,
    Json,
    Likeness,
    Loras,
    Memory,
    More,
    Negative,
    NoPreview,
    Optimizer,
    OwnBase,
    Photo,
    Preview,
    PromptFile,
    Prompts,
    SamplingSteps,
    Scheduler,
    Seed,
    Size,
    Steps,
    Strength,
    TargetSet,
    Yes,
    free_path,
    given,
    name_for,
    new_path,
    photos_of,
    prompts_in,
    refuse_file_as_prompt,
    refuse_given,
)
from hdbcli.cli.store import cp, gc, import_identity, mv, rm, verify
from hdbcli.cli.train import train_app
from hdbcli.config import PROMPTS, UNPREDICTED_STEPS, RefineConfig, user_defaults, user_file
from registry import store
from registry.errors import HdbError
from registry.files import check_writable
from registry.spec import SampleSettings

if TYPE_CHECKING:
    from hdbcli.api import Saved
    from hdbcli.training.personalise import Created


PORTRAITS = 4 * SampleSettings.steps  # steps that drawing takes where likeness is measured

MAKE, KEEP = "Make and draw", "Keep"
TURN, LOOK = "Turn into something else", "Measure, add and train"
app = new_app("One photo of a face in, that person in any style out.", cls=Boundary)


@app.callback(invoke_without_command=True)
def root(
    ctx: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    if version:
        render.say(f"hdb {__version__}")
        raise typer.Exit
    ctx.obj = time.perf_counter()  # when it began
    if values := user_defaults():
        ctx.default_map = default_map(ctx.command, values, user_file())


@app.command(rich_help_panel=MAKE)
def new(
    ctx: typer.Context,
    photo: Photo,
    name: Annotated[str | None, typer.Argument(help="Default: the photo's file name.")] = None,
    more: More = None,
    base: BaseName = None,
    steps: Annotated[
        int | None,
        typer.Option(
            min=1,
            help=f"Iterations; default: {RefineConfig.steps}, or {UNPREDICTED_STEPS} where the "
            "base has no hypernetwork.",
        ),
    ] = None,
    rank: Annotated[
        int | None,
        typer.Option(
            min=1,
            help=f"Rank to refine at; default: {RefineConfig.rank}, if the base's budget allows.",
        ),
    ] = None,
    seed: Seed = RefineConfig.seed,
    face: FaceNumber = None,
    no_refine: Annotated[bool, typer.Option("--no-refine", help="Keep the prediction.")] = False,
    optimizer: Optimizer = RefineConfig.optimizer,
    likeness: Likeness = None,
    crop: CropFile = None,
    preview: Preview = None,
    no_preview: NoPreview = False,
    targets: TargetSet = None,
    force: Force = False,
    device: Device = None,
    memory: Memory = "auto",
    yes: Yes = False,
    as_json: Json = False,
) -> None:
    """Make an identity from one photo of a face (or several of the same person).

    NAME-preview.png, in the current folder, then shows the face as it was cropped and a portrait.
    """
    photos = photos_of(photo, more)
    name = name_for(photo, name)
    new_path(name, force)
    if no_preview:
        refuse_given(ctx, "--no-preview draws none; drop it or", "preview")
    shown = None if no_preview else _preview_file(preview, name, photos)
    if no_refine:
        trained = "steps", "rank", "likeness", "seed", "optimizer"
        refuse_given(ctx, "--no-refine keeps the prediction as it is; drop it or", *trained)
    iterations = 0 if no_refine else steps or RefineConfig.steps
    with render.progress(
        crop=len(photos), load=1, predict=1, refine=iterations, draw=PORTRAITS
    ) as tell:
        from hdbcli import api
        from hdbcli.model.sample import save_crops

        created = api.new(
            photos,
            base=base,
            steps=steps,
            rank=rank,
            seed=seed,
            optimizer=optimizer,
            likeness=likeness,
            refine=not no_refine,
            face=face,
            crop=crop,
            targets=targets,
            agree=lambda: _ask_consent(yes, tell),
            device=device,
            memory=memory,
            tell=tell,
            note=render.note,
        )
    saved = api.save(created.identity, name, replace=force)
    if shown:
        save_crops([created.preview()], shown)
    _show(created, saved, as_json, preview=shown)


@app.command(rich_help_panel=MAKE)
def refine(
    name: Annotated[str, typer.Argument(autocompletion=identities, help="Name of the identity.")],
    photo: Photo,
    more: More = None,
    base: OwnBase = None,
    steps: Steps = RefineConfig.steps,
    rank: Annotated[int | None, typer.Option(min=1, help="Raise the rank to this first.")] = None,
    seed: Seed = RefineConfig.seed,
    face: FaceNumber = None,
    optimizer: Optimizer = RefineConfig.optimizer,
    likeness: Likeness = None,
    device: Device = None,
    memory: Memory = "auto",
    as_json: Json = False,
) -> None:
    """Give an existing identity more iterations on a photo; its file is replaced at the end."""
    path = store.resolve(store.check_name(name))
    check_writable(path)
    photos = photos_of(photo, more)
    with render.progress(crop=len(photos), load=1, refine=steps, draw=PORTRAITS) as tell:
        from hdbcli import api
        from hdbcli.identity.file import load

        stamp, identity = store.stamp(path), load(path)
        created = api.refine(
            identity,
            photos,
            base=base,
            steps=steps,
            rank=rank,
            seed=seed,
            optimizer=optimizer,
            likeness=likeness,
            face=face,
            device=device,
            memory=memory,
            tell=tell,
            note=render.note,
        )
    _show(created, api.save(created.identity, path.stem, replace=True, stamp=stamp), as_json)


@app.command(rich_help_panel=MAKE)
def gen(
    ctx: typer.Context,
    identity: Annotated[
        str,
        typer.Argument(
            autocompletion=identities,
            help="Name of an identity, or its file; several: alice,bob,carol.",
        ),
    ],
    prompts: Prompts = None,
    file: PromptFile = None,
    picture: AsPicture = None,
    count: Count = 4,
    seed: FirstSeed = None,
    steps: SamplingSteps = None,
    guidance: Guidance = None,
    negative: Negative = "",
    strength: Strength = 1.0,
    size: Size = None,
    scheduler: Scheduler = None,
    lora: Loras = None,
    base: OwnBase = None,
    device: Device = None,
    memory: Memory = "auto",
    out: Annotated[
        Path | None, typer.Option("-o", "--out", help="A folder, or one .png file.")
    ] = None,
    grid: Grid = False,
    html: Html = False,
    as_json: Json = False,
) -> None:
    """Draw an identity in any style, such as "a Pixar character of a [V] face".

    The same seed gives the same picture. The identity adapts prompt and negative prompt alike.
    Several people and prompts are drawn in one pass, each with the same seeds. --from draws a
    picture again, or everything on a sheet.
    """
    from hdbcli.cli import outputs

    first = int.from_bytes(os.urandom(4), "big") if seed is None else seed
    paths = [store.resolve(each) for each in identity.split(",")]
    if file and not given(ctx, "prompts"):
        prompts = None  # those of --from
    if picture and given(ctx, "identity") and not given(ctx, "base"):
        base = None  # another identity may be of another base
    texts = list(dict.fromkeys([*(prompts or []), *prompts_in(file)]))
    if given(ctx, "prompts"):
        refuse_file_as_prompt(prompts or [])
    if not texts:
        raise typer.BadParameter('say what to draw, such as "a [V] face"', param_hint="PROMPT")
    stems = [
        outputs.stem_of(path.stem, text, first + i)
        for path in paths
        for text in texts
        for i in range(count)
    ]
    kept = outputs.Album(outputs.plan_outputs(out, stems, grid, html))
    with render.progress(load=1, draw=len(stems) * (steps or SampleSettings.steps)) as tell:
        from hdbcli import api

        drawn = api.generate(
            paths,
            texts,
            count=count,
            seed=first,
            steps=steps,
            guidance=guidance,
            negative=negative,
            strength=strength,
            size=size,
            scheduler=scheduler,
            loras=lora or [],
            base=base,
            device=device,
            memory=memory,
            keep=kept.keep,
            tell=tell,
            note=render.note,
        )
    values = kept.close(drawn)
    values |= {"name": ",".join(map(store.shown, paths)), "base": drawn.settings.base}
    values |= {"prompts": texts, "loras": [each.facts() for each in drawn.loras]}
    settled = "steps", "guidance", "scheduler", "seed", "base"
    values["settings"] = {name: getattr(drawn.settings, name) for name in settled}
    (render.document if as_json else render.show_pictures)(values)


@app.command(rich_help_panel=MAKE)
def styles(base: BaseName = None, as_json: Json = False) -> None:
    """List the prompts a base model was trained on; hdb gen NAME --prompts - reads them."""
    from registry.plugins import find_base

    spec = find_base(base)
    if not spec.captions and not as_json:
        render.note(f"note: {spec.name} draws what you describe; these are the paper's examples")
    captions = spec.captions or PROMPTS
    values = {"base": spec.name, "known": bool(spec.captions), "styles": captions}
    render.result(values, "\n".join(captions))


@app.command("list", rich_help_panel=KEEP)
def list_identities(
    as_json: Json = False,
    quiet: Annotated[bool, typer.Option("-q", "--quiet", help="Names only.")] = False,
) -> None:
    """List the identities."""
    entries = store.entries()
    if as_json:
        render.document({"identities": [entry.as_dict() for entry in entries]})
    elif quiet:
        for name in store.names():  # what commands take
            render.say(name)
    elif entries:
        render.show_entries(entries)
    else:
        render.note("no identities yet; make one with: hdb new PHOTO")


@app.command(rich_help_panel=KEEP)
def show(identity: Identity, as_json: Json = False) -> None:
    """Show everything that an identity file says about itself."""
    summary = store.summary(store.resolve(identity))
    render.result(summary, lambda: render.facts(summary))


app.command("import", rich_help_panel=KEEP)(import_identity)  # a word that Python keeps for itself
for panel, commands in {
    MAKE: (score,),
    KEEP: (cp, mv, rm, verify, gc),
    TURN: (merge, export, inspect, relax, shrink, compose),
    LOOK: (compare, bench, doctor),
}.items():
    for command in commands:
        app.command(rich_help_panel=panel)(command)
app.add_typer(base_app, name="base", rich_help_panel=LOOK)
app.add_typer(train_app, name="train", rich_help_panel=LOOK)


def _ask_consent(yes: bool, bars: render.Bars) -> None:
    """Ask about every new person, once the photo is known to be usable, if there is a terminal to
    ask at: a script answers with --yes, or is taken to have asked."""
    if yes or not sys.stdin.isatty():
        return
    with bars.paused():
        ask("Faces belong to people. Does this person agree?")


def _preview_file(given: Path | None, name: str, photos: list[Path]) -> Path | None:
    """Return where the preview goes: the file that was given, or a free one in the current folder;
    None, saying so, where that cannot be written."""
    if given is not None:
        store.check_picture(given, *photos)
        return given
    path = free_path(Path(), f"{name}-preview")
    try:
        store.check_output(path)
    except HdbError as error:
        render.note(f"note: there will be no preview: {error}")
        return None
    return path


def _show(created: Created, saved: Saved, as_json: bool, preview: Path | None = None) -> None:
    for warning in created.warnings:
        render.note(f"warning: {warning}")
    values = render.created_facts(saved, created, preview)
    (render.document if as_json else render.show_created)(values)


def main() -> None:
    """Run the command line."""
    if not user_file().exists():  # its keys are checked against all commands
        only_asked(app)
    app()
