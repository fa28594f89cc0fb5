"""Judge the records of a comparison: likeness with intervals, seconds to the same likeness, styles,
drift.

All of it is a pure function of records, so that a table can be made again without a model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hdbcli.compare.methods import Contender
from hdbcli.compare.run import Record
from hdbcli.compare.timing import Alone
from hdbcli.measure.statistics import Interval, Retrieval, bootstrap, likeness_of, retrieval


@dataclass(frozen=True)
class Standing:
    """One method's line. Seconds are one person's, start-up apart; likeness is 0 to 1."""

    name: str
    people: int  # the first so many
    steps: int
    lr: float
    seconds: float
    alone: Alone
    numbers: int
    measured: Mapping[str, Interval]  # likeness, fidelity by each metric, drift
    less_than_first: Mapping[str, Interval]  # paired: the first method's minus this one's
    seconds_to_first: tuple[float | None, ...]  # to what the first has at its marks; None: never
    portraits: Retrieval | None
    styled: tuple[Retrieval, ...]  # a caption each
    found: tuple[float, ...]  # share of pictures with a face: portraits, and a caption each
    named: Mapping[str, tuple[float, ...]]  # metric -> share whose own prompt scores highest, each
    curve: tuple[tuple[int, float, Interval], ...]  # (steps, seconds, likeness)


def measures(record: Record, truth: Tensor) -> dict[str, Tensor]:
    """Return what is judged of each person at the end (P,): likeness, by the recogniser and by
    other metrics, fidelity to the prompts by each metric, and drift."""
    found = {"likeness": likeness_of(record.portraits[-1], truth)}
    found |= {f"likeness ({metric})": scores for metric, scores in record.persons.items()}
    for metric, scores in record.texts.items():
        own = scores.diagonal(dim1=0, dim2=2)  # (P, 1 + S): picture of caption i, text i
        found[f"fidelity ({metric})"] = own.mean(1)
    return found | {"drift": record.drift}


def stand(
    contender: Contender, record: Record, alone: Alone, truth: Tensor, against: Record | None
) -> Standing:
    """Judge one method on its people, the first of all in `truth`; it is held `against` the first
    method on the people that both learned, or None if it is the first."""
    people = record.portraits.shape[1]
    best = measures(against or record, truth)
    mine = measures(record, truth)
    both = min(people, len(best["likeness"]))
    less = {key: bootstrap(best[key][:both] - row[:both]) for key, row in mine.items()}
    at_marks = [likeness_of(row, truth) for row in record.portraits]
    goals = [float(likeness_of(row, truth)[:both].mean()) for row in (against or record).portraits]
    means = [float(row[:both].mean()) for row in at_marks]
    marks = [int(mark) for mark in record.marks]
    seconds = [alone.seconds(mark) for mark in marks]
    named = {}
    for metric, scores in record.texts.items():
        best_text = scores.argmax(2) == torch.arange(len(scores))[:, None]
        named[metric] = tuple(best_text.float().mean(1).tolist())
    several = people > 1
    return Standing(
        name=contender.name,
        people=people,
        steps=marks[-1],
        lr=contender.lr,
        seconds=seconds[-1],
        alone=alone,
        numbers=int(record.numbers),
        measured={key: bootstrap(row) for key, row in mine.items()},
        less_than_first={} if against is None else less,
        seconds_to_first=tuple(reached(seconds, means, goal) for goal in goals),
        portraits=retrieval(record.portraits[-1], truth) if several else None,
        styled=tuple(retrieval(row, truth) for row in record.prompted[1:]) if several else (),
        found=tuple(record.found.float().mean(1).tolist()),
        named=named,
        curve=tuple(zip(marks, seconds, map(bootstrap, at_marks), strict=True)),
    )


def reached(seconds: Sequence[float], likeness: Sequence[float], goal: float) -> float | None:
    """Return when a curve first reaches `goal`, straight between its points; None if it never
    does."""
    for i, (second, value) in enumerate(zip(seconds, likeness, strict=True)):
        if value >= goal:
            if i == 0:
                return second
            share = (goal - likeness[i - 1]) / (value - likeness[i - 1])
            return seconds[i - 1] + share * (second - seconds[i - 1])
    return None
