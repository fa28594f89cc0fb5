"""Judge the records of a comparison: likeness with intervals, seconds to the same likeness,
styles, drift.

All of it is a pure function of records, so that a table can be made again without a model. P
people, K drawings of each, S captions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hdbcli.compare.methods import Method
from hdbcli.compare.run import Record
from hdbcli.compare.timing import Alone
from hdbcli.measure.metrics import FACE
from hdbcli.measure.statistics import Found, Interval, bootstrap, bootstrap_ratio, find
from registry.metric import Recogniser


@dataclass(frozen=True, eq=False)
class Bounds:
    """Between what one recogniser's likeness lies, a number a person (P,): the base's own portraits
    and another true photo; and that photo through the autoencoder."""

    floor: Tensor
    through: Tensor
    photo: Tensor


@dataclass(frozen=True, eq=False)
class Judge:
    """One recogniser, each person's true face by it (P, D), and its bounds."""

    name: str
    recogniser: Recogniser
    truth: Tensor
    bounds: Bounds

    def likeness(self, record: Record) -> Tensor:
        """Return each person's likeness at the end, the mean of their portraits (P,); a portrait
        without a face counts 0."""
        return likeness_of(self.recogniser, record.faces[self.name][0], self.truth)


def likeness_of(recogniser: Recogniser, faces: Tensor, truth: Tensor) -> Tensor:
    """Return the mean likeness of each person's pictures (P, K, D) to their photo (P or more,
    D): (P,)."""
    theirs = truth[: len(faces), None].expand_as(faces)
    rows = recogniser.likeness(*(each.flatten(0, 1).numpy() for each in (faces, theirs)))
    return torch.from_numpy(rows).view(faces.shape[:2]).double().mean(1)


def label(measure: str, judge: str) -> str:
    """Return what a measure by one recogniser is called: dlib's goes without saying."""
    return measure if judge == FACE else f"{measure} ({judge})"


@dataclass(frozen=True)
class MethodResult:
    """One method's line. Seconds are one person's, start-up apart."""

    name: str
    family: str  # name without its schedule
    people: int  # that it learned, the first of all
    steps: int
    lr: float
    seconds: float
    alone: Alone
    numbers: int
    measured: Mapping[str, Interval]  # likeness by each judge, fidelity by each metric, drift
    less_than_first: Mapping[str, Interval]  # paired: the first method's minus this one's
    way: Mapping[str, Interval]  # judge -> share of the way from floor to ceiling
    portraits: Mapping[str, Found]  # judge -> whom portraits find among all
    styled: Mapping[str, tuple[Found, ...]]  # judge -> the same, a caption each
    together: Mapping[str, tuple[Interval, ...]]  # judge -> named right AND in five, a caption each
    found: tuple[float, ...]  # share of pictures with a face: portraits, and a caption each
    named: Mapping[str, tuple[float, ...]]  # metric -> share whose own prompt scores highest, each
    grouped: Mapping[
        str, tuple[int, Interval]
    ]  # group -> its people, and their way by the last judge


def measures(record: Record, judges: Sequence[Judge]) -> dict[str, Tensor]:
    """Return what is judged of each person (P,): likeness, by recognisers and by other metrics,
    fidelity to the prompts by each metric, and drift."""
    found = {label("likeness", judge.name): judge.likeness(record) for judge in judges}
    found |= {f"likeness ({metric})": scores for metric, scores in record.persons.items()}
    for metric, scores in record.texts.items():
        own = scores.diagonal(dim1=0, dim2=3)  # (P, K, 1 + S): picture of caption i, text i
        found[f"fidelity ({metric})"] = own.mean((1, 2))
    return found | {"drift": record.drift}


def result_of(
    method: Method,
    record: Record,
    alone: Alone,
    judges: Sequence[Judge],
    against: Record | None,
    groups: Mapping[str, Sequence[str]] | None = None,
) -> MethodResult:
    """Judge one method on its people, the first of all; it is held `against` the first method on
    the people that both learned, or None if it is the first. `groups` says which group everybody is
    in, by one division of the people or several."""
    people = len(record.drift)
    best = measures(against or record, judges)
    mine = measures(record, judges)
    both = min(people, len(best["drift"]))
    less = {key: bootstrap(best[key][:both] - row[:both]) for key, row in mine.items()}
    named = {metric: named_right(scores) for metric, scores in record.texts.items()}
    ways, portraits, styled, together = {}, {}, {}, {}
    for judge in judges:
        floor = judge.bounds.floor[:people]
        gained, whole = judge.likeness(record) - floor, judge.bounds.photo[:people] - floor
        ways[judge.name] = bootstrap_ratio(gained, whole)
        if len(judge.truth) < 2:  # one alone has no other to be told from
            continue
        looks = [find(faces, judge.truth) for faces in record.faces[judge.name]]
        portraits[judge.name] = looks[0][0]
        styled[judge.name] = tuple(told for told, _ in looks[1:])
        if named:
            right = next(iter(named.values()))[1:]
            together[judge.name] = tuple(
                bootstrap((row * five).mean(1))
                for row, (_, five) in zip(right, looks[1:], strict=True)
            )
    steps = int(record.steps)
    return MethodResult(
        name=method.name,
        family=method.family,
        people=people,
        steps=steps,
        lr=method.lr,
        seconds=alone.seconds(steps),
        alone=alone,
        numbers=int(record.numbers),
        measured={key: bootstrap(row) for key, row in mine.items()},
        less_than_first={} if against is None else less,
        way=ways,
        portraits=portraits,
        styled=styled,
        together=together,
        found=tuple(record.found.double().mean((1, 2)).tolist()),
        named={metric: tuple(rows.mean((1, 2)).tolist()) for metric, rows in named.items()},
        grouped=_by_group(gained, whole, groups or {}),
    )


def _by_group(
    gained: Tensor, whole: Tensor, groups: Mapping[str, Sequence[str]]
) -> dict[str, tuple[int, Interval]]:
    """Return how many people (of P) are in each group, and their share of the whole way."""
    found = {}
    for division, words in groups.items():
        theirs = words[: len(gained)]
        for word in sorted(set(theirs)):
            who = torch.tensor([each == word for each in theirs])
            found[f"{division}: {word}"] = int(who.sum()), bootstrap_ratio(gained[who], whole[who])
    return found


def named_right(scores: Tensor) -> Tensor:
    """Return which pictures score highest on their own prompt, of scores (1 + S, P, K, 1 + S): as 0
    and 1 (1 + S, P, K)."""
    return (scores.argmax(3) == torch.arange(len(scores))[:, None, None]).double()


def seconds_to(goal: float, finished: Sequence[MethodResult], key: str) -> float | None:
    """Return after how many seconds one method's finished schedules reach a likeness, straight
    between them; None if none does.

    Nothing is read off a schedule that has not ended: before its rate has come down it draws worse
    than a shorter one of the same seconds.
    """
    points = sorted((each.seconds, each.measured[key].mean) for each in finished)
    return reached([s for s, _ in points], [value for _, value in points], goal)


def reached(seconds: Sequence[float], likeness: Sequence[float], goal: float) -> float | None:
    """Return when a curve first reaches `goal`, straight between its points; None if it
    never does."""
    for i, (second, value) in enumerate(zip(seconds, likeness, strict=True)):
        if value >= goal:
            if i == 0:
                return second
            share = (goal - likeness[i - 1]) / (value - likeness[i - 1])
            return seconds[i - 1] + share * (second - seconds[i - 1])
    return None
