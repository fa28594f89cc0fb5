"""The styles `tiny` knows: the caption that names each one and how it is drawn."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import cv2
import numpy as np

from registry import tiny
from registry.tiny.recipe.draw import Look, Renderer, View
from registry.tiny.recipe.person import Person

NAMES = (
    *("portrait", "selfie", "pixar", "bark", "rockstar"),
    *("professional", "popart", "marble", "bronze"),
)
CAPTIONS = dict(zip(NAMES, tiny.CAPTIONS, strict=True))
STYLED = tuple(name for name in CAPTIONS if name != "portrait")

CARTOON_SLIDERS = {
    "eyes/eye-height2-incr": 0.55,
    "eyes/eye-height1-incr": 0.3,
    "eyes/eye-height3-incr": 0.3,
    "nose/nose-scale-horiz-incr": -0.45,
    "nose/nose-scale-vert-incr": -0.35,
    "nose/nose-scale-depth-incr": -0.35,
    "head/head-age-incr": -0.7,
    "chin/chin-height-incr": -0.35,
    "head/head-fat-incr": 0.25,
}
POP_PALETTES = np.array(
    [
        [(250, 220, 40), (230, 40, 120), (30, 60, 200)],
        [(60, 220, 210), (250, 120, 40), (110, 20, 140)],
        [(255, 120, 170), (60, 160, 240), (60, 20, 90)],
        [(170, 240, 80), (240, 70, 60), (20, 50, 110)],
    ]
)
WILD_HAIR = [(0.9, 0.1, 0.5), (0.1, 0.75, 0.85), (0.15, 0.8, 0.25), (0.55, 0.15, 0.9)]
STAGE_PAINT = [(0.06, 0.06, 0.09), (0.85, 0.08, 0.12), (0.10, 0.25, 0.85), (0.92, 0.90, 0.92)]


def sample_view(rng: np.random.Generator) -> View:
    """Draw a camera and a light close to a passport photo's, as an aligned crop has them."""
    return View(
        yaw=float(np.clip(rng.normal(0, 0.12), -0.3, 0.3)),
        pitch=float(rng.normal(0, 0.05)),
        roll=float(rng.normal(0, 0.02)),
        light=(float(rng.normal(0, 0.5)), float(rng.uniform(0.2, 0.7)), 0.9),
        key=_triple(np.array([0.85, 0.82, 0.78]) * rng.uniform(0.85, 1.1)),
        ambient=_triple(np.array([0.36, 0.37, 0.41]) * rng.uniform(0.8, 1.15)),
        zoom=float(rng.uniform(1.42, 1.50)),
        eyes=(float(rng.normal(0, 0.015)), 0.16 + float(rng.normal(0, 0.015))),
    )


def render_style(
    renderer: Renderer, person: Person, style: str, rng: np.random.Generator
) -> np.ndarray:
    """Draw the person in a style; every choice that is not identity comes from `rng`. (S, S, 3)
    uint8."""
    view = sample_view(rng)
    look = Look(expression={"mouth-corner-puller": max(0.0, rng.normal(0.2, 0.2))})
    picture = _PAINTERS[style](renderer, person, view, look, rng)
    return np.clip(picture, 0, 255).astype(np.uint8)


def _portrait(
    renderer: Renderer, person: Person, view: View, look: Look, rng: np.random.Generator
) -> np.ndarray:
    return _over(
        *renderer.draw(person, view, look), _backdrop(rng, rng.uniform(60, 225, 3), renderer.size)
    )


def _photo(
    renderer: Renderer, person: Person, view: View, look: Look, rng: np.random.Generator
) -> np.ndarray:
    """A portrait from further away: what a user has before the crop. No style of the model."""
    view = replace(view, zoom=view.zoom * 0.58, eyes=(view.eyes[0], 0.1 + view.eyes[1]))
    return _portrait(renderer, person, view, look, rng)


def _selfie(
    renderer: Renderer, person: Person, view: View, look: Look, rng: np.random.Generator
) -> np.ndarray:
    view = replace(
        view,
        field=48.0,
        zoom=view.zoom * 0.94,
        roll=float(rng.choice([-1, 1]) * rng.uniform(0.12, 0.24)),
        pitch=view.pitch + 0.10,
    )
    look = replace(look, expression={"mouth-corner-puller": float(rng.uniform(0.3, 0.7))})
    sky = _backdrop(
        rng, np.array([[205, 190, 170], [170, 195, 215]])[rng.integers(2)], renderer.size
    )
    picture = _over(*renderer.draw(person, view, look), sky)
    warm = picture @ np.array([[1.02, 0.04, 0.0], [0.05, 0.93, 0.02], [0.0, 0.06, 0.74]]).T
    return warm * 0.86 + np.array([34, 22, 22])  # lifted blacks: the faded look of the filter


def _pixar(
    renderer: Renderer, person: Person, view: View, look: Look, rng: np.random.Generator
) -> np.ndarray:
    known = renderer.head.sliders
    sliders = {name: value for name, value in CARTOON_SLIDERS.items() if name in known}
    look = replace(look, smooth=True, cartoon=0.75, sliders=sliders)
    view = replace(view, ambient=(0.52, 0.48, 0.52), key=(0.75, 0.70, 0.62))
    person = replace(person, beard=person.beard * 0.5)
    colours = np.array([(250, 190, 120), (150, 200, 250), (190, 235, 170)])
    scene = _backdrop(rng, colours[rng.integers(3)], renderer.size)
    return _over(*renderer.draw(person, view, look), scene)


def _sculpted(material: str, colour: tuple[int, int, int]) -> Painter:
    def paint(
        renderer: Renderer, person: Person, view: View, look: Look, rng: np.random.Generator
    ) -> np.ndarray:
        coloured = renderer.draw(person, view, replace(look, material=material))
        return _over(*coloured, _backdrop(rng, np.array(colour), renderer.size))

    return paint


def _rockstar(
    renderer: Renderer, person: Person, view: View, look: Look, rng: np.random.Generator
) -> np.ndarray:
    """Stage light from both sides in two colours, and either a painted band or a wild hair
    colour."""
    side = float(rng.choice([-1, 1]))
    pink, blue = (1.15, 0.35, 0.80), (0.15, 0.65, 1.20)
    key, fill = (pink, blue) if rng.random() < 0.5 else (blue, pink)
    view = replace(view, light=(0.9 * side, 0.3, 0.7), key=key, fill=fill, ambient=(0.24,) * 3)
    if person.hair is None or rng.random() < 0.5:
        paint = STAGE_PAINT[rng.integers(len(STAGE_PAINT))]
        look = replace(look, paint=(*paint, 0.85))
    else:
        person = replace(person, hair_colour=WILD_HAIR[rng.integers(len(WILD_HAIR))])
    stage = _backdrop(rng, np.array([22, 16, 34]), renderer.size)
    for colour in (pink, blue):
        stage = stage + _glow(renderer.size, rng) * 120 * np.array(colour)
    return _over(*renderer.draw(person, view, look), stage)


def _professional(
    renderer: Renderer, person: Person, view: View, look: Look, rng: np.random.Generator
) -> np.ndarray:
    """Stand further back, so that jacket and collar show, before a vignetted studio backdrop."""
    suits = [(0.10, 0.11, 0.14), (0.10, 0.14, 0.26), (0.25, 0.25, 0.27)]
    person = replace(person, shirt=suits[rng.integers(len(suits))])
    view = replace(
        view,
        zoom=view.zoom * 0.72,
        light=(0.6, 0.6, 0.8),
        key=(0.80, 0.78, 0.75),
        ambient=(0.42, 0.42, 0.44),
        eyes=(view.eyes[0], view.eyes[1] + 0.12),
    )
    size = renderer.size
    y, x = (np.mgrid[0:size, 0:size] + 0.5) / size - 0.5
    falloff = np.clip(1.15 - 1.3 * (x**2 + y**2), 0, 2)[:, :, None]
    studio = falloff * np.array([(105, 112, 125), (120, 115, 108)][rng.integers(2)])
    return _over(*renderer.draw(person, view, replace(look, jacket=True)), studio)


def _popart(
    renderer: Renderer, person: Person, view: View, look: Look, rng: np.random.Generator
) -> np.ndarray:
    """Print in four inks: shades by quantile inside the figure, dots on the ground."""
    palette = POP_PALETTES[rng.integers(len(POP_PALETTES))]
    colour, cover = renderer.draw(person, view, look)
    inside = cover[:, :, 0] > 0.5
    grey = cv2.cvtColor(np.clip(colour, 0, 255).astype(np.uint8), cv2.COLOR_RGB2GRAY)
    grey = cv2.GaussianBlur(grey, (0, 0), renderer.size / 80).astype(np.float32)
    steps = np.quantile(grey[inside], [0.12, 0.45, 0.75])
    inks = np.array([(25, 15, 35), palette[2], palette[1], (255, 235, 215)])
    size = renderer.size
    y, x = np.mgrid[0:size, 0:size] * (64 / size)
    dots = (np.sin(x * 1.1) * np.sin(y * 1.1) > 0.55)[:, :, None]
    ground = np.where(dots, palette[0] * 0.75, palette[0])
    return np.where(inside[:, :, None], inks[np.digitize(grey, steps)], ground)


def _over(colour: np.ndarray, cover: np.ndarray, ground: np.ndarray) -> np.ndarray:
    return colour + ground * (1 - cover)


def _backdrop(rng: np.random.Generator, colour: np.ndarray, size: int) -> np.ndarray:
    """A plain wall: one colour with a slight change from top to bottom. (S, 1, 3)."""
    ramp = np.linspace(0, 1, size)[:, None, None]
    top = colour * rng.uniform(0.88, 1.12)
    bottom = np.clip(top + rng.normal(0, 12, 3), 0, 255)
    wall = top * (1 - ramp) + bottom * ramp
    return np.clip(wall, 0, 255)


def _glow(size: int, rng: np.random.Generator) -> np.ndarray:
    y, x = np.mgrid[0:size, 0:size] / size
    cx, cy = rng.choice([rng.uniform(0, 0.25), rng.uniform(0.75, 1)]), rng.uniform(0, 0.4)
    return np.exp(-((x - cx) ** 2 + (y - cy) ** 2) / 0.03)[:, :, None]


def _triple(values: np.ndarray) -> tuple[float, float, float]:
    a, b, c = (float(v) for v in values)
    return a, b, c


Painter = Callable[[Renderer, Person, View, Look, np.random.Generator], np.ndarray]

_PAINTERS: dict[str, Painter] = {
    "photo": _photo,
    "portrait": _portrait,
    "selfie": _selfie,
    "pixar": _pixar,
    "bark": _sculpted("bark", (90, 130, 70)),
    "rockstar": _rockstar,
    "professional": _professional,
    "popart": _popart,
    "marble": _sculpted("marble", (120, 125, 140)),
    "bronze": _sculpted("bronze", (70, 85, 95)),
}
