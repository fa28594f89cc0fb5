"""Who a rendered person is: every trait drawn from one seed, so that a seed is an identity."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

RACES = ("african", "asian", "caucasian")
# Hair that covers an eye (short03, bob01, bob02) is left out: half a face is half an identity.
HAIR_FEMALE = (
    "long01",
    "long01",
    "Braid01",
    "Braid01",
    "ponytail01",
    "short02",
    "short04",
    "afro01",
)
HAIR_MALE = ("short01", "short01", "short02", "short04", "short04", "afro01", None, None)
HAIR = tuple(sorted({h for h in HAIR_FEMALE + HAIR_MALE if h}))
HAIR_COLOURS = np.array(
    [
        (18, 16, 16),
        (35, 24, 18),
        (60, 38, 24),
        (92, 58, 32),
        (140, 96, 54),
        (196, 156, 96),
        (112, 44, 22),
        (150, 150, 150),
        (220, 216, 210),
    ]
)
EYES_DARK = ("brown", "brown", "brownlight")
EYES_ALL = (*EYES_DARK, "deepblue", "blue", "lightblue", "green", "grey", "bluegreen")
HEAD_SHAPES = ("diamond", "invertedtriangular", "oval", "rectangular", "round", "square")
BROWS = 12
GLASSES, HATS = 0.2, 0.1  # shares of people who wear them, in all of their pictures


@dataclass(frozen=True)
class Person:
    """The traits of one rendered person; `sliders` are signed weights of the face sliders."""

    seed: int
    races: Mapping[str, float]
    male: float
    age: float
    weight: float
    sliders: Mapping[str, float]
    skin_age: str
    main_race: str
    tone: tuple[float, float, float]
    hair: str | None
    hair_colour: tuple[float, float, float]
    brow: int
    eyes: str
    beard: float
    lipstick: float
    shirt: tuple[float, float, float]
    glasses: bool
    hat: tuple[float, float, float] | None


def sample_person(seed: int, sliders: Mapping[str, bool]) -> Person:
    """Draw a person. `sliders` maps each face slider's name to whether it is signed (two-sided)."""
    rng = np.random.default_rng([seed, 7])  # the second number keeps views of the same seed apart
    races = dict(zip(RACES, (float(x) for x in rng.dirichlet([0.45] * 3)), strict=True))
    main_race = max(races, key=lambda race: races[race])
    man = bool(rng.random() < 0.5)
    male = float(np.clip(man + rng.normal(0, 0.06), 0, 1))
    age = float(np.clip(rng.beta(1.1, 2.2), 0, 1))
    hairs: Sequence[str | None] = HAIR_MALE if man else HAIR_FEMALE
    warm = np.array([1, 1 - 0.05 * rng.random(), 1 - 0.10 * rng.random()])
    return Person(
        seed=seed,
        races=races,
        male=male,
        age=age,
        weight=float(np.clip(rng.normal(0, 0.4), -0.9, 0.9)),
        sliders=_sample_sliders(rng, sliders),
        skin_age="old" if age > 0.6 else "middleage" if age > 0.3 else "young",
        main_race=main_race,
        tone=_rgb(np.clip(rng.normal(1, 0.07) * warm, 0.75, 1.15)),
        hair=hairs[int(rng.integers(len(hairs)))],
        hair_colour=_rgb(_sample_hair_colour(rng, main_race, age) / 255),
        brow=int(rng.integers(1, BROWS + 1)),
        eyes=str(rng.choice(EYES_ALL if main_race == "caucasian" else EYES_DARK)),
        beard=float(np.clip(rng.normal(-0.1, 0.5), 0, 0.9)) if man else 0.0,
        lipstick=float(rng.random() * (0.12 if man else 0.55)),
        shirt=_rgb(rng.uniform(0.12, 0.9, 3)),
        glasses=bool(rng.random() < GLASSES),
        hat=_rgb(rng.uniform(0.1, 0.6, 3)) if rng.random() < HATS else None,
    )


def _sample_sliders(rng: np.random.Generator, sliders: Mapping[str, bool]) -> dict[str, float]:
    """Draw every slider from a normal; ears and overall head shape vary less, noses a little
    less."""
    damping = {"ears": 0.45, "head": 0.55, "nose": 0.7}
    chosen = {}
    for name, signed in sorted(sliders.items()):
        value = rng.normal(0, 0.30 * damping.get(name.split("/")[0], 1.0))
        if not signed:
            value = max(0.0, value) * 0.7
        chosen[name] = float(np.clip(value, -0.8, 0.8))
    # The head-shape targets exclude one another: keep two of them.
    shapes = [n for n in chosen if n.startswith("head/") and n.split("-")[-1] in HEAD_SHAPES]
    chosen.update(dict.fromkeys(shapes, 0.0))
    for name in rng.choice(shapes, 2, replace=False):
        chosen[str(name)] = float(rng.random() * 0.8)
    return chosen


def _sample_hair_colour(rng: np.random.Generator, main_race: str, age: float) -> np.ndarray:
    weights = np.array([3, 3, 3, 2, 1.2, 1.2, 0.9, 0.2, 0.1])
    if age > 0.55:
        weights[-2:] = (5, 4)
    elif main_race != "caucasian":
        weights[3:7] *= 0.12
    return HAIR_COLOURS[rng.choice(len(weights), p=weights / weights.sum())]


def _rgb(values: np.ndarray) -> tuple[float, float, float]:
    r, g, b = (float(x) for x in values)
    return r, g, b
