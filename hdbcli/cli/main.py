"""The command line: commands that make, draw and keep identities, and the doors to the others."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hdbcli import __version__
from hdbcli.cli import render
from hdbcli.cli.algebra import compose, export, inspect, relax, shrink
from hdbcli.cli.bases import base_app
from hdbcli.cli.boundary import Boundary, ask, new_app
from hdbcli.cli.doctor import doctor
from hdbcli.cli.measure import bench, compare, score
from hdbcli.cli.merge import merge
from hdbcli.cli.options import (
    BaseName,
    Count,
    CropFile,
    Device,
    FaceNumber,
    FirstSeed,
    Force,
    Grid,
    Guidance,
    Identity,
    Json,
    Likeness,
    Loras,
    Memory,
    More,
    Negative,
    NewOptimizer,
    NewSeed,
    Optimizer,
    Photo,
    Prompt,
    SamplingSteps,
    Scheduler,
    Seed,
    Size,
    Steps,
    Strength,
    TargetSet,
    Yes,
    check_crop,
    name_for,
    new_path,
    open_on,
    photos_of,
    refuse_given,
    spec_of,
    spec_with,
    stack,
    wear,
    within_memory,
)
from hdbcli.cli.store import cp, gc, import_identity, mv, rm, verify
from hdbcli.cli.train import train_app
from hdbcli.config import UNPREDICTED_STEPS, RefineConfig
from hdbcli.errors import HdbError
from registry import store
from registry.files import check_writable

if TYPE_CHECKING:
    from hdbcli.interop.lora_stack import Stacked
    from hdbcli.model.base import Base
    from hdbcli.model.memory import MemoryPlan
    from hdbcli.training.personalise import Created
    from registry.spec import BaseSpec


MAKE, KEEP = "Make and draw", "Keep"
TURN, LOOK = "Turn into something else", "Measure, add and train"
app = new_app("One photo of a face in, that person in any style out.", cls=Boundary)


@app.callback(invoke_without_command=True)
def root(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    if version:
        render.say(f"hdb {__version__}")
        raise typer.Exit


@app.command(rich_help_panel=MAKE)
def new(
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
    seed: NewSeed = None,
    face: FaceNumber = None,
    no_refine: Annotated[bool, typer.Option("--no-refine", help="Keep the prediction.")] = False,
    optimizer: NewOptimizer = None,
    likeness: Likeness = None,
    crop: CropFile = None,
    targets: TargetSet = None,
    force: Force = False,
    device: Device = None,
    memory: Memory = "auto",
    yes: Yes = False,
    as_json: Json = False,
) -> None:
    """Make an identity from one photo of a face (or several of the same person)."""
    photos = photos_of(photo, more)
    name = name_for(photo, name)
    path = new_path(name, force)
    check_crop(crop, photos)
    given: dict[str, Any] = {"steps": steps, "rank": rank, "likeness": likeness}
    given |= {"seed": seed, "optimizer": optimizer}
    if no_refine:
        refuse_given("--no-refine keeps the prediction as it is; drop it or", **given)
    from hdbcli.training.personalise import settle

    given |= {"seed": seed or RefineConfig.seed, "optimizer": optimizer or RefineConfig.optimizer}
    wanted = partial(settle, **given)
    spec = spec_with(base, targets)
    config = None if no_refine else wanted
    created = _make(
        spec, device, memory, photos, face, likeness, config, None, crop, lambda: _ask_consent(yes)
    )
    _store(created, name, path, spec.budget, as_json, new=not force)


@app.command(rich_help_panel=MAKE)
def refine(
    name: Annotated[str, typer.Argument(help="Name of the identity.")],
    photo: Photo,
    more: More = None,
    base: Annotated[str | None, typer.Option("--base", help="Default: the identity's.")] = None,
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
    from hdbcli.identity.file import load
    from hdbcli.training.personalise import settle

    path = store.resolve(store.check_name(name))
    check_writable(path)
    stamp, identity = store.stamp(path), load(path)
    wanted = partial(
        settle,
        steps=steps,
        rank=rank or identity.rank,
        seed=seed,
        optimizer=optimizer,
        likeness=likeness,
        goes_on=True,
    )
    photos = photos_of(photo, more)
    spec = spec_of(base or identity.base)
    created = _make(spec, device, memory, photos, face, likeness, wanted, identity)
    _store(created, path.stem, path, spec.budget, as_json, stamp=stamp)


@app.command(rich_help_panel=MAKE)
def gen(
    identity: Annotated[
        str, typer.Argument(help="Name of an identity, or its file; several: alice,bob,carol.")
    ],
    prompt: Prompt,
    count: Count = 4,
    seed: FirstSeed = None,
    steps: SamplingSteps = None,
    guidance: Guidance = None,
    negative: Negative = "",
    strength: Strength = 1.0,
    size: Size = None,
    scheduler: Scheduler = None,
    lora: Loras = None,
    base: Annotated[str | None, typer.Option("--base", help="Default: the identity's.")] = None,
    device: Device = None,
    memory: Memory = "auto",
    out: Annotated[
        Path | None, typer.Option("-o", "--out", help="A folder, or one .png file.")
    ] = None,
    grid: Grid = False,
    as_json: Json = False,
) -> None:
    """Draw an identity in any style, such as "a Pixar character of a [V] face".

    The same seed gives the same picture. Prompt and negative prompt both wear the identity. Several
    people are drawn in one pass, each with the same seeds.
    """
    from hdbcli.cli import outputs
    from hdbcli.identity.file import load
    from hdbcli.interop import lora_stack
    from hdbcli.model import sample

    first = int.from_bytes(os.urandom(4), "big") if seed is None else seed
    paths = [store.resolve(each) for each in identity.split(",")]
    jobs = [(path, first + i) for path in paths for i in range(count)]
    names, seeds = [store.shown(path) for path, _ in jobs], [number for _, number in jobs]
    targets = outputs.plan_outputs(out, [f"{path.stem}-{number}" for path, number in jobs], grid)
    loras = [lora_stack.read(each) for each in lora or []]  # a bad one is told before the work
    spec = spec_of(base or load(paths[0]).base)
    settings, said = lora_stack.sampling(spec, loras)
    given: dict[str, Any] = {
        "steps": steps,
        "guidance": guidance,
        "scheduler": scheduler,
        "size": size,
    }
    given = {option: value for option, value in given.items() if value is not None}
    settings = replace(settings, negative=negative, **given)  # what was asked for comes first
    for line in [said, *sample.doubts(spec, settings, strength)]:
        if line:
            render.note(line)
    if "[V]" not in prompt:
        render.note('hint: the prompt has no [V], the place of the person: "a [V] face as ..."')
    kept = outputs.Album(names, targets, prompt, settings, spec.name, strength)

    def draw(plan: MemoryPlan) -> list[Stacked]:
        with render.progress() as tell:
            tell("load", 0, 1)
            loaded, people = wear(paths, spec.name, device, plan)
            stacked = stack(loaded, loras)
            kept.more = lora_stack.parameters(stacked)
            theta = people.scaled(strength)
            if len(paths) > 1:  # each wears their own; one person alone serves all pictures
                theta = theta[[i for i in range(len(paths)) for _ in range(count)]]
            sample.generate(loaded, theta, prompt, seeds, settings, tell, kept.keep)
        return stacked

    work = sample.work_of(len(seeds), size or spec.resolution, exact=bool(loras))
    stacked = within_memory(spec, device, memory, work, draw)
    values = {"name": ",".join(map(store.shown, paths)), "base": spec.name, **kept.close()}
    values |= {"prompt": prompt, "loras": [each.facts() for each in stacked]}
    (render.document if as_json else render.show_pictures)(values)


@app.command("list", rich_help_panel=KEEP)
def list_identities(
    as_json: Json = False,
    quiet: Annotated[bool, typer.Option("-q", "--quiet", help="Names only.")] = False,
) -> None:
    """List the identities."""
    entries = store.entries()
    if as_json:
        render.document([entry.as_dict() for entry in entries])
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
    if as_json:
        render.document(summary)
    else:
        render.facts(summary)


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


def _ask_consent(yes: bool) -> None:
    """Ask for every new person, once the photo is known to be usable, where there is somebody to
    ask: a script answers with --yes, or is taken to have asked."""
    if yes or not sys.stdin.isatty():
        return
    ask("Faces belong to people. Does this person agree?")


def _make(
    spec: BaseSpec,
    device: str | None,
    memory: str,
    photos: list[Path],
    face: int | None,
    likeness: float | None,
    config: Callable[[Base], RefineConfig] | None,
    identity: Any = None,
    crop_file: Path | None = None,
    agreed: Callable[[], None] = lambda: None,
) -> Created:
    """Crop before loading, since a bad photo should be told at once; then create or refine.

    `config` may depend on the base; None keeps the prediction. `agreed` ends the command if the
    person does not agree.
    """
    from hdbcli.model import sample
    from hdbcli.model.hypernetwork_file import targets_of
    from hdbcli.training import personalise

    start = time.perf_counter()
    with render.progress() as tell:
        crops = personalise.crop_photos(photos, spec, face, tell)
    render.show_doubts(crops)
    cropped = time.perf_counter() - start
    agreed()
    start = time.perf_counter() - cropped  # nobody's thinking counts
    if crop_file is not None:
        sample.save_crops([crop.image for crop in crops], crop_file)
    digest = identity.targets_digest if identity else targets_of(spec.hypernetwork)

    def make(plan: MemoryPlan) -> Created:
        with render.progress() as tell:
            tell("load", 0, 1)
            loaded = open_on(spec, device, plan, digest)
            settled = config and config(loaded)
            if identity is not None and settled:
                return personalise.continue_refining(identity, crops, loaded, settled, tell)
            if settled and spec.hypernetwork is None:
                render.note(
                    f"hint: {spec.name} has no hypernetwork, so this starts from nobody and takes "
                    f"{settled.steps} iterations; once hdb train hypernetwork has made one: "
                    f"hdb base set-hypernetwork {spec.name} FILE"
                )
            return personalise.create(crops, loaded, settled, tell)

    work = personalise.work_of(spec, config is not None, likeness)
    created = within_memory(spec, device, memory, work, make)
    total = time.perf_counter() - start
    return replace(created, seconds={"crop": cropped, **created.seconds, "total": total})


def _store(
    created: Created,
    name: str,
    path: Path,
    budget: int,
    as_json: bool,
    new: bool = False,
    stamp: tuple[int, int, int] | None = None,
) -> None:
    """Save what was made and tell of it; with the `stamp` of the file that it is to replace, only
    if that is still the same."""
    from hdbcli.identity.budget import dtype_for
    from hdbcli.identity.file import keep_aside, save

    identity = created.identity
    dtype = dtype_for(identity, budget)
    if stamp is not None and (now := store.stamp(path)) != stamp:
        what = "changed" if now else "is gone, removed"
        raise HdbError(f"{name} {what} while it was refined; {keep_aside(identity, path, dtype)}")
    size = save(identity, path, dtype, new)
    for warning in created.warnings:
        render.note(f"warning: {warning}")
    values = render.created_facts(name, str(path), size, dtype, created)
    (render.document if as_json else render.show_created)(values)


main: Callable[[], None] = app
