"""Run a comparison from people to its table, curves, sheet and document."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch

from hdbcli.compare.methods import Method
from hdbcli.compare.page import page
from hdbcli.compare.results import Bounds, Judge, MethodResult, label, likeness_of, result_of
from hdbcli.compare.run import Record, Setup, new_setup, run_method
from hdbcli.compare.timing import Alone, time_alone
from hdbcli.config import PROMPTS, Tell, unnamed
from hdbcli.faces.embedding import landmarks
from hdbcli.faces.photo import read_photo
from hdbcli.measure.groups import groups
from hdbcli.measure.metrics import FACE, Judges
from hdbcli.measure.plot import Axes, Curve, save_chart
from hdbcli.measure.statistics import Found, Interval, bootstrap, find
from hdbcli.method.hypernet import HyperNetwork
from hdbcli.model.base import Base
from hdbcli.model.contact_sheet import contact_sheet
from hdbcli.model.device import machine
from hdbcli.model.sample import png
from hdbcli.training.people import People
from registry.checkpoints.contents import read_checkpoint
from registry.errors import HdbError
from registry.files import write_beside, write_kept

RATES = (1 / 30, 1 / 10, 1 / 3, 1.0, 3.0)  # times a rate, to choose from: large models want less
AXES = Axes(
    "likeness by seconds of learning one person (start-up apart)",
    "seconds",
    "likeness of portraits",
    log_x=True,
)


@dataclass(frozen=True)
class Ceiling:
    """Whom pictures of each person find by each recogniser, the share of them with a face, and of
    those that are also named right, as portraits are."""

    portraits: Mapping[str, Found]
    found: float
    together: Mapping[str, Interval]


@dataclass(frozen=True)
class TrueStyle:
    """What true pictures of the people in a style reach, and what the autoencoder leaves of it."""

    prompt: str
    true: Ceiling
    through: Ceiling


@dataclass(frozen=True)
class Limits:
    """Between what one recogniser's likeness lies, and whom true photos find by it."""

    floor: Interval  # portraits by the base model alone
    autoencoder: Interval  # the photo that methods learned from, encoded and decoded
    photo: Interval  # that photo itself: another true picture of the person
    through: Found | None  # how well that photo finds its person, through the autoencoder
    other_photo: Found | None  # and as it is


@dataclass(frozen=True)
class Comparison:
    """The lines of all methods, and between what likeness must lie."""

    people: int
    machine: str
    same_photo: bool  # there was but one of each, so methods were judged on what they saw
    results: tuple[MethodResult, ...]
    checkpoint: int | None  # bytes of the base's files
    limits: Mapping[str, Limits]  # by each recogniser
    styles: tuple[TrueStyle, ...]  # where true pictures in the styles were given


def run(
    setup: Setup,
    methods: Sequence[Method],
    styles: Sequence[TrueStyle],
    out: Path,
    load: Callable[[], tuple[Base, HyperNetwork | None]],
) -> tuple[Comparison, dict[str, Record]]:
    """Run every method; the first is the one that others are compared with."""
    records: dict[str, Record] = {}
    results: list[MethodResult] = []
    judges, limits = _bounds(setup)
    whose = groups(setup.given, np.array(setup.base.spec.template))
    timed: dict[str, Alone] = {}  # schedules of a method differ in how many steps they have
    for method in methods:
        if method.family not in timed or not method.steps:
            timed[method.family] = time_alone(method, load, setup.given[0], setup.batch)
        record = records[method.name] = run_method(setup, method, out / "records")
        first = next(iter(records.values())) if results else None
        results.append(result_of(method, record, timed[method.family], judges, first, whose))
    found = Comparison(
        people=len(setup.given),
        machine=machine(setup.base.device),
        same_photo=setup.same_photo,
        results=tuple(results),
        checkpoint=_size(setup.base),
        limits=limits,
        styles=tuple(styles),
    )
    return found, records


def tuned(
    base: Base,
    model: HyperNetwork | None,
    people: People,
    methods: Sequence[Method],
    out: Path,
    batch: int | None,
    tell: Tell,
) -> list[Method]:
    """Choose each method's learning rate by likeness on people who are not in the test: by dlib's,
    as nothing may follow the other judge."""
    setup = new_setup(base, model, people, Judges(), batch, tell)
    chosen = []
    for method in methods:
        rates = [method.lr * rate for rate in RATES] if method.steps else [method.lr]
        tries = [replace(method, lr=rate) for rate in rates]

        def mean(attempt: Method) -> float:
            record = run_method(setup, attempt, out / "tuning")
            faces, truth = record.faces[FACE][0], setup.truth[FACE]
            return float(likeness_of(setup.recognisers[FACE], faces, truth).mean())

        chosen.append(max(tries, key=mean))
    return chosen


def true_styles(folder: Path, people: People, setup: Setup) -> list[TrueStyle]:
    """Judge true pictures as drawn ones are judged: `folder/PERSON/STYLE-*.png`, where STYLE is a
    word of the prompt, spaces left out, such as rockstar.

    Raise HdbError if a person has none in a style that others have.
    """
    styles: list[TrueStyle] = []
    for prompt in PROMPTS[1:] if len(people.names) > 1 else ():  # one alone has no neighbour
        words = prompt.lower().replace(" ", "")
        rows = [
            [f for f in sorted((folder / name).glob("*-*.png")) if f.stem.split("-")[0] in words]
            for name in people.names
        ]
        if not any(rows):
            continue
        if not all(rows):
            missing = people.names[[bool(row) for row in rows].index(False)]
            raise HdbError(f"{folder / missing} has no true picture of {prompt!r}; others have")
        pictures = [_as_drawn(read_photo(row[0]), setup.base) for row in rows]
        through = setup.base.through_autoencoder(pictures)
        true, kept = (_ceiling(each, prompt, setup) for each in (pictures, through))
        styles.append(TrueStyle(prompt, true, kept))
    if not styles and len(people.names) > 1:
        raise HdbError(f"{folder} has no PERSON/STYLE-*.png of these people")
    return styles


def _ceiling(pictures: Sequence[np.ndarray], prompt: str, setup: Setup) -> Ceiling:
    told = {
        name: find(torch.from_numpy(each.embed(pictures))[:, None], setup.truth[name])
        for name, each in setup.recognisers.items()
    }
    together = {}
    for metric in list(setup.judges.texts.values())[:1]:
        scores = torch.tensor(metric.score(pictures, [unnamed(each) for each in PROMPTS]))
        right = (scores.argmax(1) == PROMPTS.index(prompt)).double()
        together = {name: bootstrap(right * five[:, 0]) for name, (_, five) in told.items()}
    seen = sum(landmarks(picture) is not None for picture in pictures) / len(pictures)
    return Ceiling({name: each for name, (each, _) in told.items()}, seen, together)


def _as_drawn(picture: np.ndarray, base: Base) -> np.ndarray:
    """Scale the middle square of a picture to the size of what the base draws."""
    side = min(picture.shape[:2])
    top, left = ((length - side) // 2 for length in picture.shape[:2])
    middle = picture[top : top + side, left : left + side]
    size = base.spec.resolution
    filtering = cv2.INTER_AREA if side > size else cv2.INTER_CUBIC
    return cv2.resize(middle, (size, size), interpolation=filtering)


def _size(base: Base) -> int | None:
    """Return the bytes of the weights that a base is loaded from."""
    if base.spec.files is None:
        return None
    try:
        files = read_checkpoint(base.spec.files).files
    except HdbError:  # a plug-in's own layout
        return None
    return sum(file.stat().st_size for file in files if file.suffix == ".safetensors")


def _bounds(setup: Setup) -> tuple[list[Judge], dict[str, Limits]]:
    """Return every recogniser with its bounds, and these as intervals: likeness of the base's own
    portraits, of the photo through the autoencoder and of the photo, and whom the last two find
    among all, where there are others."""
    side = setup.plain.shape[1:]
    rows = (
        list(setup.plain.reshape(-1, 2, *side)[:, 0]),
        setup.base.through_autoencoder(setup.given),
        setup.given,
    )
    judges, limits = [], {}
    for name, each in setup.recognisers.items():
        truth = setup.truth[name]
        faces = [torch.from_numpy(each.embed(row))[:, None] for row in rows]
        bounds = Bounds(*(likeness_of(each, row, truth) for row in faces))
        judges.append(Judge(name, each, truth, bounds))
        limits[name] = Limits(
            floor=bootstrap(bounds.floor),
            autoencoder=bootstrap(bounds.through),
            photo=bootstrap(bounds.photo),
            through=find(faces[1], truth)[0] if len(truth) > 1 else None,
            other_photo=find(faces[2], truth)[0] if len(truth) > 1 else None,
        )
    return judges, limits


def document(comparison: Comparison, command: str) -> dict[str, Any]:
    """Return what `hdb compare --json` prints."""
    return {
        "date": datetime.now(timezone.utc).date().isoformat(),
        "machine": comparison.machine,
        "command": command,
        **_finite(asdict(comparison)),
    }


def _finite(facts: Any) -> Any:
    """Put None where a figure is not a number, such as a share of a way that is none: JSON knows
    no NaN."""
    if isinstance(facts, dict):
        return {key: _finite(value) for key, value in facts.items()}
    if isinstance(facts, list | tuple):
        return [_finite(value) for value in facts]
    return None if isinstance(facts, float) and not math.isfinite(facts) else facts


def save(
    comparison: Comparison,
    records: dict[str, Record],
    photo: np.ndarray,
    facts: dict[str, Any],
    out: Path,
) -> list[Path]:
    """Write document, curves, sheet and page to a folder; `photo` is the first person's, `facts`
    the document."""
    names = ("compare.json", "curves.png", "sheet.png", "compare.md")
    paths = [out / name for name in names]
    with write_beside(paths[0]) as beside:
        beside.write_text(json.dumps(facts, indent=2), encoding="utf-8")
    with write_beside(paths[3]) as beside:
        text = page(comparison, facts["command"], facts["date"])
        beside.write_text(text, encoding="utf-8")
    last = list(comparison.limits)[-1]  # the judge that nothing learns from, if it is there
    families = list(dict.fromkeys(each.family for each in comparison.results))
    curves = [_curve([s for s in comparison.results if s.family == f], last) for f in families]
    x = [second for curve in curves for second in curve.x] or [1.0]
    for title, bound, look in (
        ("photo (ceiling)", comparison.limits[last].photo, "--"),
        ("base (floor)", comparison.limits[last].floor, ":"),
    ):
        curves.append(Curve(title, [min(x), max(x)], [bound.mean] * 2, bound=look))
    with write_beside(paths[1]) as beside:
        save_chart(AXES, curves, [], beside)
    rows = {"the photo": [photo]}
    rows |= {name: list(record.pictures[:, 0].numpy()) for name, record in records.items()}
    sheet = contact_sheet(list(rows.values()), PROMPTS, list(rows))
    content = png(sheet, f"rows: {', '.join(rows)}")
    write_kept(paths[2], lambda file: file.write_bytes(content))
    return paths


def _curve(finished: Sequence[MethodResult], judge: str) -> Curve:
    """Draw a method's likeness by its finished schedules."""
    points = sorted(
        (each.seconds, each.measured[label("likeness", judge)])
        for each in finished
        if each.seconds > 0
    )
    people = sorted({each.people for each in finished})
    return Curve(
        f"{finished[0].family} ({', '.join(map(str, people))})",
        [s for s, _ in points],
        [i.mean for _, i in points],
        [i.low for _, i in points],
        [i.high for _, i in points],
    )
