"""Score one identity: likeness between its floor and its ceiling, style fidelity, drift, and what
they mean.

HyperDreamBooth §4.2 scores subject and prompt fidelity; drift, the change of pictures that the
person is not in, is what DreamBooth's prior preservation is for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from hdbcli.config import CAPTIONS, PORTRAIT, PROMPTS, Tell, unnamed
from hdbcli.faces.embedding import SAME_PERSON, embed, found
from hdbcli.faces.photo import Crop
from hdbcli.measure.metrics import FACE, Judges
from hdbcli.model import sample
from hdbcli.model.base import Adapter, Base
from registry.metric import Metric

SEEDS = (1, 2, 3, 4)  # the first of them are those of `hdb new`
DRIFTING = (PORTRAIT, CAPTIONS[1])
SLIGHT, STRONG = 6.0, 20.0  # mean change of a pixel, 0 to 255


@dataclass(frozen=True)
class Likeness:
    """Likeness of portraits, 0 to 1, between the base's own and what a photo could reach."""

    portraits: float
    floor: float
    ceiling: float

    @property
    def way(self) -> float | None:
        """Return how far from floor to ceiling the portraits are, 1 at the ceiling; None if that is
        no way."""
        if self.ceiling <= self.floor:
            return None
        return (self.portraits - self.floor) / (self.ceiling - self.floor)


@dataclass(frozen=True)
class Style:
    """A text metric on the project page's captions: with the identity on, and of the base alone."""

    score: float
    base_score: float
    named: float  # share of pictures whose own caption scores highest of all
    base_named: float


@dataclass(frozen=True)
class Score:
    """What was measured; without a photo there is no likeness."""

    likeness: Likeness | None  # of faces
    subjects: dict[str, Likeness]  # by every other metric that compares with photos
    styles: dict[str, Style]
    faces: float  # share of pictures in which the detector found a face
    drift: float


def score(base: Base, adapter: Adapter, crops: Sequence[Crop], judges: Judges, tell: Tell) -> Score:
    """Draw the portrait and each caption with four seeds, with the identity on and without.

    Likeness is that of as many portraits as the base's spec says: `hdb new` tells the same number.
    """
    tell = sample.as_one(tell, 2 * (len(PROMPTS) + len(DRIFTING)))
    compared = base.spec.portraits
    mine, plain = ([_draw(base, w, p, tell) for p in PROMPTS] for w in (adapter, None))
    styles = {}
    for name, metric in judges.texts.items():
        (own, own_named), (without, base_named) = (_judged(metric, rows) for rows in (mine, plain))
        styles[name] = Style(own, without, own_named, base_named)
    seen = found(embed([each for row in mine for each in row]))
    subjects = {
        name: _likeness(
            base,
            metric,
            mine[0][:compared],
            plain[0][:compared],
            [crop.image for crop in crops],
        )
        for name, metric in judges.persons.items()
        if crops
    }
    likeness = subjects.pop(FACE, None)
    faces, drift = float(seen.float().mean()), _drift(base, adapter, tell)
    return Score(likeness, subjects, styles, faces, drift)


def words(result: Score) -> list[str]:
    """Say it to a person who knows none of the measures."""
    lines = []
    if result.likeness is not None:
        like = result.likeness
        same = "takes them for" if like.portraits > SAME_PERSON else "does not take them for"
        lines.append(
            f"likeness {like.portraits:.2f}: a face recogniser {same} the person in the photo; "
            f"{_way(like)}"
        )
    for name, like in result.subjects.items():
        lines.append(
            f"likeness ({name}) {like.portraits:.2f}: of a stranger {like.floor:.2f}, of a photo "
            f"{like.ceiling:.2f}"
        )
    for name, style in result.styles.items():
        lines.append(
            f"style ({name}): {style.named:.0%} of the pictures show the style that was asked for, "
            f"{style.base_named:.0%} of the base's own"
        )
    lines.append(f"faces: the detector finds one in {result.faces:.0%} of the pictures")
    how = "hardly change" if result.drift < SLIGHT else "change"
    how = "change noticeably" if result.drift > STRONG else how
    lines.append(f"drift {result.drift:.1f} of 255: pictures of other people {how}")
    return lines


def _way(like: Likeness) -> str:
    if like.way is None:
        return (
            f"the photos do not agree with each other, or the base cannot draw them: a photo "
            f"reaches {like.ceiling:.2f}, no more than a stranger ({like.floor:.2f})"
        )
    return (
        f"{100 * like.way:.0f} % of the way from a stranger ({like.floor:.2f}) to a photo "
        f"({like.ceiling:.2f})"
    )


def _draw(base: Base, adapter: Adapter | None, prompt: str, tell: Tell) -> list[np.ndarray]:
    drawn = sample.generate(base, adapter, prompt, SEEDS, base.spec.sampling, tell)
    return [picture.image for picture in drawn]


def _judged(metric: Metric, rows: Sequence[Sequence[np.ndarray]]) -> tuple[float, float]:
    """Return the mean score of pictures against their own prompt, and how often it is
    the highest."""
    texts = [unnamed(prompt) for prompt in PROMPTS]
    table = torch.tensor([metric.score(row, texts) for row in rows])  # (prompts, seeds, texts)
    own = torch.arange(len(rows))[:, None]
    named = (table.argmax(2) == own).float().mean()
    return float(table.diagonal(dim1=0, dim2=2).mean()), float(named)


def _likeness(
    base: Base,
    metric: Metric,
    portraits: Sequence[np.ndarray],
    strangers: Sequence[np.ndarray],
    photos: Sequence[np.ndarray],
) -> Likeness:
    """Compare with every photo; the ceiling is the photos with each other, or one through
    the autoencoder."""

    def near(pictures: Sequence[np.ndarray]) -> Tensor:
        return torch.tensor(metric.score(pictures, photos))

    if len(photos) > 1:
        ceiling = near(photos)[~torch.eye(len(photos), dtype=torch.bool)]
    else:
        ceiling = near(base.through_autoencoder(photos))
    return Likeness(*(float(each.mean()) for each in (near(portraits), near(strangers), ceiling)))


def _drift(base: Base, adapter: Adapter, tell: Tell) -> float:
    changes = []
    for prompt in DRIFTING:
        with_it, without = (
            np.array(_draw(base, w, unnamed(prompt), tell), np.float32) for w in (adapter, None)
        )
        changes.append(np.abs(with_it - without).mean())
    return float(np.mean(changes))
