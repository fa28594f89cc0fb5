"""Commands that measure: one identity, or every method on the same people."""

from __future__ import annotations

import shlex
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hdbcli.cli import render
from hdbcli.cli.options import (
    BaseName,
    Device,
    FaceNumber,
    Identity,
    Json,
    Memory,
    More,
    Pattern,
    base_name,
    check_folder,
    refuse_given,
    spec_of,
    wear,
    within_memory,
)
from hdbcli.config import (
    MAIN_METHODS,
    METHODS,
)
from registry import store
from registry.bases.settings import DEFAULT

if TYPE_CHECKING:
    from hdbcli.bench.harness import Row
    from hdbcli.measure.metrics import Judges
    from hdbcli.model.memory import MemoryPlan


_Judge = Annotated[
    bool, typer.Option("--judge", help="Fetch FaceRes once (145 MB), the judge nothing trains on.")
]


def score(
    identity: Identity,
    photo: More = None,
    base: Annotated[str | None, typer.Option(help="Another base than its own.")] = None,
    face: FaceNumber = None,
    judge: _Judge = False,
    device: Device = None,
    memory: Memory = "auto",
    as_json: Json = False,
) -> None:
    """Say how alike, how stylish and how well-behaved an identity is; likeness needs --photo."""
    from hdbcli.identity.file import load
    from hdbcli.measure import score as measure
    from hdbcli.training.personalise import crop_photos

    if not photo:
        refuse_given("there is no face to choose; add --photo or drop", face=face)
    path = store.resolve(identity)
    spec = spec_of(base or load(path).base)
    with render.progress() as tell:
        crops = crop_photos(photo or [], spec, face, tell)
    render.show_doubts(crops)
    judges = _judges(spec.family, judge)

    def measured(plan: MemoryPlan) -> measure.Score:
        loaded, worn = wear([path], spec.name, device, plan)
        with render.progress() as tell:
            return measure.score(loaded, worn, crops, judges, tell)

    result = within_memory(spec, device, memory, measure.work_of(spec), measured)
    if as_json:
        render.document(asdict(result))
    else:
        render.say("\n".join(measure.words(result)))


def _judges(family: str, fetch: bool) -> Judges:
    """Load what can judge a family of base models, saying what is left out; `fetch` what can be."""
    from hdbcli.measure.metrics import load_judges
    from registry.plugins import load_metrics

    judges = load_judges(load_metrics(), family, fetch)
    for line in judges.missing:
        render.note(f"left out: {line}")
    return judges


_Photos = Annotated[
    Path,
    typer.Argument(help="A photo, a folder of photos, or a folder with one for each person."),
]
_METHODS = (
    "NAME, NAME@400 for a schedule of 400 steps, or NAME:12 for the first 12 people alone, of "
    f"{', '.join(METHODS)}."
)
_Batch = Annotated[
    int | None, typer.Option(min=1, help="Samples a step of every method; default: the base's.")
]
_People = Annotated[int | None, typer.Option(min=1, help="Only the first so many people.")]
_Tune = Annotated[Path | None, typer.Option(help="Other people, to choose each learning rate on.")]


def compare(
    photos: _Photos,
    methods: Annotated[str, typer.Option(help=_METHODS)] = MAIN_METHODS,
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
    from functools import partial

    from hdbcli.compare import comparison
    from hdbcli.compare.methods import choose, suited
    from hdbcli.compare.run import new_arena
    from hdbcli.model.base import open_pair
    from hdbcli.model.memory import enough
    from hdbcli.training.people import read_people

    chosen = choose(methods.split(","), steps)
    check_folder(out)
    load = partial(open_pair, base_name(base), device, any(each.predicted for each in chosen))
    loaded, model = load()
    chosen = [suited(each, loaded, steps) for each in chosen]
    with render.progress() as tell, enough("close other programs, take a smaller --batch"):
        test = read_people(photos, loaded.spec, pattern, False, tell).first(people)
        render.show_skipped(test.skipped)
        if tune:
            others = read_people(tune, loaded.spec, pattern, False, tell)
            chosen = comparison.tuned(loaded, model, others, chosen, out, batch, tell)
        elif loaded.spec.name != DEFAULT:
            render.note(f"note: rates were chosen on {DEFAULT}; --tune OTHERS chooses them anew")
        judges = _judges(loaded.spec.family, judge)
        arena = new_arena(loaded, model, test, judges, batch, tell)
        styles = comparison.true_styles(truth, test, arena) if truth else []
        result, records = comparison.run(arena, chosen, styles, out, load)
    facts = comparison.document(result, shlex.join(["hdb", *sys.argv[1:]]))
    paths = comparison.save(result, records, arena.given[0], facts, out)
    if as_json:
        render.document(facts)
    else:
        render.show_contest(result)
    for path in paths:
        render.note(str(path))


def bench(
    names: Annotated[
        list[str] | None,
        typer.Argument(
            help="basis, people, bank, merge, sd15, train, device or derived; default: all, the "
            "last only with --people."
        ),
    ] = None,
    people: Annotated[
        Path | None, typer.Option(help="Folder of held-out people, for derived.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Measure what hdb promises, each beside the plain alternative; needs 9 GB of disk here."""
    from datetime import datetime, timezone

    from hdbcli.bench import suite as benchmarks
    from hdbcli.model.device import choose_device, machine

    where = machine(choose_device(None))
    date = datetime.now(timezone.utc).date().isoformat()
    rows: list[Row] = []
    try:
        with render.progress() as tell:
            for row in benchmarks.run(names or [], people, tell):
                rows.append(row)
    finally:  # what took minutes to measure is shown, even if what follows fails
        if rows and not as_json:
            render.show_bench(rows, f"{date}, {where}")
    if as_json:
        values = [asdict(row) | {"kept": row.kept} for row in rows]
        render.document({"date": date, "machine": where, "rows": values})
