"""Lay a comparison out as tables, and as a page of Markdown with curves, command and date."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hdbcli.compare.results import label, seconds_to
from hdbcli.compare.run import DRAWINGS
from hdbcli.config import CAPTIONS, PROMPTS

if TYPE_CHECKING:
    from hdbcli.compare.comparison import Ceiling, Comparison
    from hdbcli.compare.results import MethodResult
    from hdbcli.measure.statistics import Found, Interval

READING = """\
Seconds and memory are one person's, in a process of their own, start-up apart. Likeness to
{photo} is 1 - distance of dlib's face embeddings, and the cosine of FaceRes' where it was fetched
(`--judge`); every picture is embedded by its own landmarks, one without a face counts 0 and finds
no one. Of each person and prompt {drawings} pictures are drawn; 95 % intervals are over people.
Bytes are two a trained number. Fidelity is how well a metric finds a picture to fit its prompt,
drift the mean change of a pixel, of 255, in pictures whose prompt has no [V]."""
FEWEST = 3  # people of a group that are told of
PAPERS = (1200, 5000)  # steps of DreamBooth and of Textual Inversion
OTHER_PHOTO, SAME_PHOTO = "a photo that no method saw", "the photo that methods learned from"

LIMITS = """\
What this does not show: how any of it fares on another base model, on another machine, or with the
settings that each method's authors chose for theirs. dlib's recogniser is one of the two
(SFace is the other) that the hypernetwork reads and training with `--likeness` follows; so do the
refinement of each person where the base asks for likeness, and methods named -all. Its praise of
them is partly an echo: FaceRes, which nothing learns from, is the judge to believe. The captions to
which such a refinement holds a person's styles are those that are judged.
Columns are of the people that each method learned, which may be fewer than another's."""


@dataclass(frozen=True)
class Table:
    """Rows of text below their heads."""

    title: str
    heads: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    def markdown(self) -> str:
        lines = [self.heads, ("---",) * len(self.heads), *self.rows]
        return f"## {self.title}\n\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines)


def page(comparison: Comparison, command: str, date: str) -> str:
    """Return the page; pictures are `curves.png` and `sheet.png` beside it."""
    methods, *others = (table.markdown() for table in tables(comparison))
    photo = SAME_PHOTO if comparison.same_photo else OTHER_PHOTO
    parts = [
        f"# {comparison.people} people, {len(comparison.results)} methods",
        f"Made by `{command}` on {comparison.machine}, {date}.",
        READING.format(photo=photo, drawings=DRAWINGS),
        methods,
        *notes(comparison),
        "![Likeness against seconds](curves.png)",
        *others,
        "![One person by every method](sheet.png)",
        LIMITS,
    ]
    return "\n\n".join(parts) + "\n"


def tables(comparison: Comparison) -> Iterator[Table]:
    """Yield the methods, and with several people whom pictures find and what styles keep."""
    first, *rest = comparison.results
    heads: tuple[str, ...] = ("method", "people", "steps", "rate", "seconds", "start-up", "memory")
    heads = (*heads, "bytes", *first.measured)
    yield Table("Methods", heads, tuple(map(_line, comparison.results)))
    names = tuple(f"{result.name} ({result.people})" for result in comparison.results)
    judges = tuple(comparison.limits)
    ways = tuple(
        (each.name, str(each.people), *(_percent(each.way[judge]) for judge in judges))
        for each in comparison.results
    )
    title = "Share of the way from the base's own portraits to a true photo"
    yield Table(title, ("method", "people", *judges), ways)
    divided = tuple(
        (each.name, group, str(count), _percent(way))
        for each in comparison.results
        for group, (count, way) in each.grouped.items()
        if count >= FEWEST
    )
    if divided:
        title = f"The same by {judges[-1]}, group by group as estimated from the photos"
        yield Table(title, ("method", "group", "people", "share of the way"), divided)
    if rest:
        families = tuple(dict.fromkeys(each.family for each in comparison.results))
        title = f"Seconds to the final likeness of {first.name}, and times its own"
        yield Table(title, ("likeness, by", *families), tuple(_speeds(comparison, families)))
    less = tuple(
        (each.name, str(min(each.people, first.people)), *_intervals(each.less_than_first))
        for each in rest
    )
    if less:
        heads = ("method", "people of both", *first.measured)
        yield Table(f"What {first.name} has minus what each other has, paired", heads, less)
    if comparison.people > 1:
        found = tuple(_found(comparison))
        yield Table(
            f"The right person among all {comparison.people}",
            ("picture", "people", "judge", "first", "in five", "AUC"),
            found,
        )
    across = ("prompt", *names, "true pictures", "through the autoencoder")
    if comparison.people > 1:
        yield Table(
            "Faces in a style, its mean taken away: AUC", across, tuple(_styles(comparison))
        )
        title = "Style named right AND face in the first five, its style's mean taken away"
        yield Table(title, across, tuple(_together(comparison)))
    yield Table("Style named by a classifier, face found", across, tuple(_named(comparison)))


def notes(comparison: Comparison) -> list[str]:
    """Say between what bounds likeness lies, and how small an identity is beside its base."""
    first = comparison.results[0]
    bounds = [
        f"Likeness ({judge}) of the base's own portraits, the floor, is {_interval(each.floor)}; "
        f"of the photo through the autoencoder {_interval(each.autoencoder)}, and of the photo "
        f"itself, the ceiling, {_interval(each.photo)}."
        for judge, each in comparison.limits.items()
    ]
    if not comparison.checkpoint or not first.numbers:
        return bounds
    times = comparison.checkpoint / (2 * first.numbers)
    size = (
        f"The base's weights take {comparison.checkpoint:,} bytes, {times:,.0f} times what the "
        f"{first.numbers:,} numbers of {first.name} take in half precision."
    )
    return [*bounds, size]


def _line(line: MethodResult) -> tuple[str, ...]:
    return (
        line.name,
        str(line.people),
        f"{line.steps:,}",
        f"{line.lr:g}",
        _seconds(line.seconds),
        _seconds(line.alone.startup),
        f"{line.alone.memory / 1e6:,.0f} MB",
        f"{2 * line.numbers:,}",
        *_intervals(line.measured),
    )


def _speeds(comparison: Comparison, families: Sequence[str]) -> Iterator[tuple[str, ...]]:
    """Hold seconds against the first method's: to its final likeness by each judge, read from
    finished schedules alone, and of as many steps as the papers took."""
    first = comparison.results[0]
    for judge in comparison.limits:
        key = label("likeness", judge)
        goal = first.measured[key].mean
        taken = []
        for family in families:
            finished = [each for each in comparison.results if each.family == family]
            taken.append(seconds_to(goal, finished, key))
        yield f"{goal:.3f}, {judge}", *(_against(each, first.seconds) for each in taken)
    for steps in PAPERS if first.steps else ():
        longest = {each.family: each for each in comparison.results if each.steps}
        alone = [longest[f].alone.seconds(steps) if f in longest else None for f in families[1:]]
        yield f"{steps:,} steps", "-", *(_against(each, first.seconds, "-") for each in alone)


def _against(seconds: float | None, first: float, absent: str = "never") -> str:
    if seconds is None:
        return absent
    return _seconds(seconds) + (f" ({_digits(seconds / first)} x)" if first else "")


def _seconds(seconds: float) -> str:
    return f"{_digits(seconds)} s"


def _digits(value: float) -> str:
    """Return a number to two digits or more."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 1 else f"{value:.2g}"


def _found(comparison: Comparison) -> Iterator[tuple[str, ...]]:
    for judge, limits in comparison.limits.items():
        rows: list[tuple[str, int, Found | None]] = [
            (f"portrait, {s.name}", s.people, s.portraits.get(judge)) for s in comparison.results
        ]
        rows.append(("true photo through the autoencoder", comparison.people, limits.through))
        photo = "the same photo" if comparison.same_photo else "another true photo"
        rows.append((photo, comparison.people, limits.other_photo))
        for name, people, told in rows:
            if told is not None:
                shares = _percent(told.first), _percent(told.five)
                yield name, str(people), judge, *shares, _interval(told.auc)


def _styles(comparison: Comparison) -> Iterator[tuple[str, ...]]:
    for judge in comparison.limits:

        def told(ceiling: Ceiling, judge: str = judge) -> str:
            return f"{ceiling.portraits[judge].auc.mean:.3f}"

        true = _ceilings(comparison, told)
        for i, prompt in enumerate(CAPTIONS):
            aucs = (f"{s.styled[judge][i].auc.mean:.3f}" for s in comparison.results)
            yield f"{prompt}, {judge}", *aucs, *true.get(prompt, ("-", "-"))


def _together(comparison: Comparison) -> Iterator[tuple[str, ...]]:
    for judge in comparison.limits:

        def told(ceiling: Ceiling, judge: str = judge) -> str:
            return _percent(ceiling.together[judge]) if ceiling.together else "-"

        true = _ceilings(comparison, told)
        for i, prompt in enumerate(CAPTIONS):
            shares = (
                _percent(s.together[judge][i]) if s.together else "-" for s in comparison.results
            )
            yield f"{prompt}, {judge}", *shares, *true.get(prompt, ("-", "-"))


def _named(comparison: Comparison) -> Iterator[tuple[str, ...]]:
    true = _ceilings(comparison, lambda ceiling: f"{ceiling.found:.0%}")
    for i, prompt in enumerate(PROMPTS):
        for metric in comparison.results[0].named:
            shares = (f"{s.named[metric][i]:.0%}" for s in comparison.results)
            yield f"{prompt}: named ({metric})", *shares, "-", "-"
        faces = (f"{s.found[i]:.0%}" for s in comparison.results)
        yield f"{prompt}: face", *faces, *true.get(prompt, ("-", "-"))


def _ceilings(comparison: Comparison, told: Callable[[Ceiling], str]) -> dict[str, tuple[str, str]]:
    """Return what is told of both ceilings of each prompt that has true pictures."""
    return {style.prompt: (told(style.true), told(style.through)) for style in comparison.styles}


def _intervals(measured: Mapping[str, Interval]) -> Iterator[str]:
    for name, interval in measured.items():
        yield _interval(interval, 1 if name == "drift" else 3)


def _interval(interval: Interval, digits: int = 3) -> str:
    """Return a mean with what it lies between; without, if that is no more than the mean."""
    mean, low, high = (
        f"{value:.{digits}f}" for value in (interval.mean, interval.low, interval.high)
    )
    return mean if low == high else f"{mean} ({low} to {high})"


def _percent(interval: Interval) -> str:
    """Return a share with what it lies between; a dash where there is none."""
    if math.isnan(interval.mean):
        return "-"
    mean, low, high = (f"{value:.0%}" for value in (interval.mean, interval.low, interval.high))
    return mean if low == high else f"{mean} ({low} to {high})"
