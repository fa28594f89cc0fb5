"""Commands that measure: one identity, every method on the same people, or this installation."""

from __future__ import annotations

import shlex
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hdbcli.cli import complete, render
from hdbcli.cli.options import (
    BaseName,
    Device,
    FaceNumber,
    Identity,
    Json,
    Memory,
    More,
    OwnBase,
    Pattern,
    refuse_given,
)
from hdbcli.config import MAIN_METHODS, METHOD_NAMES, PROMPTS
from registry.spec import SampleSettings

if TYPE_CHECKING:
    from hdbcli.bench.harness import Row


_Judge = Annotated[
    bool, typer.Option("--judge", help="Fetch FaceRes once (145 MB), the judge nothing trains on.")
]


def score(
    ctx: typer.Context,
    identity: Identity,
    photo: More = None,
    base: OwnBase = None,
    face: FaceNumber = None,
    judge: _Judge = False,
    device: Device = None,
    memory: Memory = "auto",
    as_json: Json = False,
) -> None:
    """Measure likeness, style fidelity and drift; likeness needs --photo."""
    if not photo:
        refuse_given(ctx, "there is no face to choose; add --photo or drop", "face")
    with render.progress(crop=len(photo or []), load=1, draw=DRAWN) as tell:
        from hdbcli import api
        from hdbcli.measure.score import words

        result = api.score(
            identity,
            photo or [],
            base=base,
            face=face,
            judge=judge,
            device=device,
            memory=memory,
            tell=tell,
            note=render.note,
        )
    render.result(asdict(result), "\n".join(words(result)))


_Photos = Annotated[
    Path,
    typer.Argument(help="A photo, a folder of photos, or a folder with one for each person."),
]
_METHODS = (
    "NAME, NAME@400 for a schedule of 400 steps, or NAME:12 for the first 12 people alone, of "
    f"{', '.join(METHOD_NAMES)}."
)
DRAWN = 2 * len((*PROMPTS, *PROMPTS[:2])) * 4 * SampleSettings.steps  # steps that score draws
BENCHMARKS = ("basis", "people", "bank", "merge", "sd15", "train", "device", "derived")
_Batch = Annotated[
    int | None, typer.Option(min=1, help="Samples a step of every method; default: the base's.")
]
_People = Annotated[int | None, typer.Option(min=1, help="Use only the first N people.")]
_Tune = Annotated[Path | None, typer.Option(help="Other people, to choose each learning rate on.")]


def compare(
    photos: _Photos,
    methods: Annotated[
        str, typer.Option(autocompletion=complete.methods, help=_METHODS)
    ] = MAIN_METHODS,
    base: BaseName = None,
    steps: Annotated[
        int | None, typer.Option(min=1, help="Most steps of any method, for a first look.")
    ] = None,
    batch: _Batch = None,
    people: _People = None,
    tune: _Tune = None,
    truth: Annotated[
        Path | None, typer.Option(help="True pictures in the styles: PERSON/pixar-0.png, ...")
    ] = None,
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder of the results.")] = Path(
        "compare"
    ),
    pattern: Pattern = "*",
    judge: _Judge = False,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Let methods learn the same people: seconds, memory, bytes, likeness, style, drift.

    What is done is kept in the folder of the results: interrupted, the same command goes on.
    """
    with render.progress() as tell:
        from hdbcli import api

        made = api.compare(
            photos,
            out,
            methods=methods,
            base=base,
            steps=steps,
            batch=batch,
            people=people,
            tune=tune,
            truth=truth,
            pattern=pattern,
            judge=judge,
            device=device,
            command=shlex.join(["hdb", *sys.argv[1:]]),
            tell=tell,
            note=render.note,
        )
    values = {**made.document, "files": made.files}
    render.result(values, lambda: render.show_comparison(made.comparison))
    for path in made.files:
        render.note(str(path))


def bench(
    names: Annotated[
        list[str] | None,
        typer.Argument(
            autocompletion=complete.words(*BENCHMARKS),
            help="basis, people, bank, merge, sd15, train, device or derived; default: all, the "
            "last only with --people.",
        ),
    ] = None,
    people: Annotated[
        Path | None, typer.Option(help="Folder of held-out people, for derived.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Measure what hdb promises, each beside the plain alternative; needs 9 GB of disk here."""
    from datetime import datetime, timezone

    date = datetime.now(timezone.utc).date().isoformat()
    rows: list[Row] = []
    where = ""
    try:
        with render.progress() as tell:
            from hdbcli.bench import suite as benchmarks
            from hdbcli.model.device import choose_device, machine

            where = machine(choose_device(None))
            for row in benchmarks.run(names or [], people, tell):
                rows.append(row)
    finally:  # what took minutes to measure is shown, even if what follows fails
        if rows and not as_json:
            render.show_bench(rows, f"{date}, {where}")
    if as_json:
        values = [asdict(row) | {"kept": row.kept} for row in rows]
        render.document({"date": date, "machine": where, "rows": values})


def doctor(as_json: Json = False) -> None:
    """Examine the installation: libraries, devices, base models, plug-ins, store and caches.

    The exit code is 1 only if something is broken that hdb needs. Nothing is changed.
    """
    from hdbcli.doctor import BROKEN, examine

    checks = list(examine())
    broken = [check for check in checks if check.state == BROKEN]
    sections: dict[str, Any] = {"ok": not broken}
    for check in checks:
        sections.setdefault(check.section, []).append(check.as_dict())
    rows = [(check.section, check.name, check.state, check.found) for check in checks]
    render.result(sections, lambda: render.table(("", "", "state", "found"), rows))
    if broken:
        names = ", ".join(check.name for check in broken)
        render.note(f"error: hdb needs what is broken: {names}")
        raise typer.Exit(1)
