"""Paint a photograph of a face in every style of `tiny`, in image space.

Each painter takes a `Subject` (see subject.py) seen through a camera of its own, and draws it with
arithmetic on pixels: light from the surface's directions, materials from brightness, inks from
quantiles. All that is not the person comes from the generator, so a seed is a picture. About 15 ms
a picture on one core.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import cv2
import numpy as np

from registry.errors import HdbError
from registry.tiny.recipe.styles import CAPTIONS, POP_PALETTES
from registry.tiny.recipe.subject import (
    CANVAS,
    CHIN,
    LEFT_CHEEK,
    NOSE,
    PARTS,
    RIGHT_CHEEK,
    Subject,
    blur,
    camera,
    grey_of,
    guided,
    polygon,
)

WALL = 1024  # pixels of the textures, which repeat

Colour = tuple[float, float, float]


@dataclass(frozen=True, eq=False)
class Painted:
    """A picture (S, S, 3) uint8, and where its five points lie: (5, 2), x and y in pixels."""

    pixels: np.ndarray
    points: np.ndarray


def paint(subject: Subject, style: str, rng: np.random.Generator, size: int = 128) -> Painted:
    """Paint a photograph, read from its wide crop, in a style named in CAPTIONS.

    Raise HdbError for another name.
    """
    if style not in _PAINTERS:
        raise HdbError(f"no style is called {style!r}; there are {', '.join(CAPTIONS)}")
    picture, points = _PAINTERS[style](subject, rng)
    pixels = cv2.resize(np.clip(picture, 0, 255), (size, size), interpolation=cv2.INTER_AREA)
    return Painted(np.round(pixels).astype(np.uint8), points * (size / len(picture)))


# --- what several painters use -----------------------------------------------------------------


def _mix(a: np.ndarray, b: np.ndarray | Colour, share: np.ndarray | float) -> np.ndarray:
    """Go from a to b by a share (S, S) or a number."""
    a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
    if isinstance(share, np.ndarray):
        share = share[:, :, None].astype(np.float32, copy=False)
    return a + (b - a) * share


def _screen(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Add light as film does, never past white."""
    a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
    return 255 - (255 - np.clip(a, 0, 255)) * (1 - np.clip(b, 0, 255) / 255)


def _saturate(rgb: np.ndarray, gain: float) -> np.ndarray:
    grey = grey_of(rgb)[:, :, None] * 255
    return grey + (rgb - grey) * gain


def _ramp(value: np.ndarray, stops: list[tuple[float, Colour]]) -> np.ndarray:
    """Colour values (S, S) by straight lines between stops (S, S, 3)."""
    at = np.array([stop for stop, _ in stops])
    colours = np.array([colour for _, colour in stops], np.float32)
    table = np.stack([np.interp(np.linspace(0, 1, 256), at, c) for c in colours.T], axis=1)
    return table.astype(np.float32)[(np.clip(value, 0, 1) * 255).astype(np.uint8)]


def _lit(normals: np.ndarray, direction: Colour) -> np.ndarray:
    """Return how far surfaces face a light from `direction` (right, down, to the viewer), 0..1."""
    towards = np.array(direction, np.float32)
    return np.clip(normals @ (towards / np.linalg.norm(towards)), 0, 1)


def _shiny(normals: np.ndarray, direction: Colour, power: float) -> np.ndarray:
    """Return the highlight of a light (Blinn and Phong's)."""
    towards = np.array(direction) / np.linalg.norm(direction)
    x, y, z = (float(v) for v in towards)
    return _lit(normals, (x, y, z + 1)) ** power


def _bumped(normals: np.ndarray, height: np.ndarray, depth: float) -> np.ndarray:
    """Tilt surfaces by the slopes of a height (S, S)."""
    slopes = np.dstack(
        [cv2.Sobel(height, cv2.CV_32F, *axis, scale=0.125) for axis in ((1, 0), (0, 1))]
        + [np.zeros_like(height)]
    )
    bent = normals - depth * slopes
    return bent / (np.linalg.norm(bent, axis=2, keepdims=True) + 1e-6)


def _grid(side: int) -> tuple[np.ndarray, np.ndarray]:
    """Return x and y of the pixels, 0..1."""
    line = (np.arange(side, dtype=np.float32) + 0.5) / side
    return np.broadcast_to(line, (side, side)), np.broadcast_to(line[:, None], (side, side))


def _spots(
    rng: np.random.Generator, side: int, colours: list[Colour], count: int, radius: float
) -> np.ndarray:
    """Draw lights out of focus: discs of several colours (side, side, 3), to be added."""
    light = np.zeros((side, side, 3), np.float32)
    for _ in range(count):
        one = np.zeros_like(light)
        colour = colours[rng.integers(len(colours))]
        centre = rng.uniform(0, side, 2).astype(int).tolist()
        reach = round(side * radius * rng.uniform(0.5, 1.3))
        cv2.circle(one, centre, reach, colour, -1, cv2.LINE_8)
        light += one * float(rng.uniform(0.25, 0.8))
    return cv2.GaussianBlur(light, (0, 0), side * 0.012)


@functools.cache
def _noise(across: int, down: int, seed: int) -> np.ndarray:
    """Return a smooth noise (WALL, WALL), mean 0 and deviation 1, that repeats; so many waves."""
    rng = np.random.default_rng([20261128, seed])
    total = np.zeros((WALL, WALL), np.float32)
    for octave in range(4):
        cells = rng.normal(size=(down << octave, across << octave)).astype(np.float32)
        padded = np.pad(cells, 2, mode="wrap")
        scale = WALL // cells.shape[0], WALL // cells.shape[1]
        large = cv2.resize(
            padded,
            (padded.shape[1] * scale[1], padded.shape[0] * scale[0]),
            interpolation=cv2.INTER_CUBIC,
        )
        top, left = 2 * scale[0], 2 * scale[1]
        total += large[top : top + WALL, left : left + WALL] * 0.55**octave
    return total / total.std()


@functools.cache
def _bark() -> np.ndarray:
    """Return the height of bark (WALL, WALL), 0..1: plates with long cracks between them."""
    x, y = np.meshgrid(np.arange(WALL), np.arange(WALL))
    bend = 14 * _noise(8, 8, 1)
    ridges = _noise(64, 16, 2)
    warped = ridges[(y + bend.astype(int)) % WALL, (x + (0.8 * bend).astype(int)) % WALL]
    plates = np.clip(np.abs(warped) * 1.5, 0, 1) ** 0.6
    return np.clip(0.78 * plates + 0.13 + 0.06 * _noise(128, 64, 3), 0, 1).astype(np.float32)


@functools.cache
def _veins() -> np.ndarray:
    """Return the veins of marble (WALL, WALL), 0..1: where two noises cross nought, thin."""
    thin = np.exp(-((_noise(8, 8, 4) * 7) ** 2)) + 0.6 * np.exp(-((_noise(16, 16, 5) * 8) ** 2))
    cloudy = np.clip(0.5 + 0.5 * _noise(8, 8, 6), 0, 1)
    return (np.clip(thin, 0, 1) * cloudy).astype(np.float32)


def _cut(
    texture: np.ndarray, rng: np.random.Generator, normals: np.ndarray, wrap: float, scale: float
) -> np.ndarray:
    """Cut a piece of a texture that follows the surface: it is pressed together where that turns
    away."""
    side = len(normals)
    x, y = _grid(side)
    u = x * side + wrap * normals[:, :, 0]
    v = y * side + wrap * normals[:, :, 1]
    start = rng.uniform(0, WALL, 2)
    return cv2.remap(
        texture,
        (u * scale + start[0]).astype(np.float32) % (WALL - 1),
        (v * scale + start[1]).astype(np.float32) % (WALL - 1),
        cv2.INTER_LINEAR,
        None,
        cv2.BORDER_WRAP,
    )


def _side(rng: np.random.Generator) -> float:
    """Choose left, -1, or right, 1."""
    return 1.0 if rng.random() < 0.5 else -1.0


def _eyes(subject: Subject, soft: float) -> np.ndarray:
    return np.maximum(subject.part("right_eye", soft), subject.part("left_eye", soft))


# --- the painters ------------------------------------------------------------------------------

SUITS = [(34, 36, 44), (32, 42, 72), (66, 68, 74), (48, 40, 42), (26, 26, 28)]

Drawing = tuple[np.ndarray, np.ndarray]  # the picture (S, S, 3) float32 0..255, and five points


def _portrait(subject: Subject, rng: np.random.Generator) -> Drawing:
    return subject.close.rgb, subject.close.points


def _selfie(subject: Subject, rng: np.random.Generator) -> Drawing:
    """Hold the camera near and askew: a wide lens, a warm and faded filter, daylight behind."""
    roll = math.radians(rng.uniform(7, 14)) * _side(rng)
    seen = subject.seen(
        camera(rng.uniform(0.84, 0.92), roll, (0, rng.uniform(-0.01, 0.03))), CANVAS
    )
    side = CANVAS
    rgb = seen.rgb
    if rng.random() < 0.65:
        scene = _outdoors(rng, side)
        edge = seen.person
        rgb = _mix(scene, rgb, edge)
    # The wide lens: what is near the nose is nearer, what is far shrinks.
    strength = rng.uniform(0.16, 0.26)
    nose = seen.mesh[NOSE]
    x, y = _grid(side)
    dx, dy = x * side - nose[0], y * side - nose[1]
    reach = 0.62 * side
    pull = 1 - strength * np.clip(1 - (dx**2 + dy**2) / reach**2, 0, 1)
    rgb = cv2.remap(
        rgb,
        (nose[0] + dx * pull - 0.5).astype(np.float32),
        (nose[1] + dy * pull - 0.5).astype(np.float32),
        cv2.INTER_LINEAR,
        None,
        cv2.BORDER_REFLECT_101,
    )
    points = pushed(seen.points, nose, strength, reach)
    grey = grey_of(rgb)
    mean = float(grey[side // 4 : 3 * side // 4, side // 4 : 3 * side // 4].mean())
    rgb = 255 * (np.clip(rgb, 0, 255) / 255) ** min(max(math.log(0.58) / math.log(mean), 0.6), 1.25)
    rgb = _saturate((rgb - 128) * 1.12 + 132, 1.12)
    warm = rgb @ np.array([[1.04, 0.03, 0.0], [0.04, 0.94, 0.02], [0.0, 0.06, 0.78]], np.float32).T
    faded = warm * 0.87 + np.array([36, 22, 26], np.float32)
    leak = np.exp(
        -(((x - (0.5 + 0.5 * _side(rng))) / 0.4) ** 2) - ((y - rng.uniform(0, 0.5)) / 0.45) ** 2
    )
    faded = _screen(faded, leak[:, :, None] * np.array([100, 50, 14]) * rng.uniform(0.2, 0.9))
    fall = 1 - 0.3 * np.clip((x - 0.5) ** 2 + (y - 0.5) ** 2, 0, 1)
    return faded * fall[:, :, None], points


def pushed(points: np.ndarray, centre: np.ndarray, strength: float, reach: float) -> np.ndarray:
    """Map points through the lens, whose remap goes the other way, by fixed-point steps."""
    away = points - centre
    goal = away.copy()
    for _ in range(12):
        square = (goal**2).sum(axis=1, keepdims=True)
        goal = away / (1 - strength * np.clip(1 - square / reach**2, 0, 1))
    return centre + goal


def _outdoors(rng: np.random.Generator, side: int) -> np.ndarray:
    """Paint daylight out of focus: sky over trees, a beach or a street in the evening."""
    skies: list[tuple[Colour, Colour, Colour]] = [
        ((150, 200, 240), (120, 160, 90), (80, 120, 60)),
        ((130, 195, 235), (190, 215, 220), (225, 205, 165)),
        ((250, 200, 150), (230, 150, 110), (110, 80, 90)),
        ((225, 225, 220), (200, 185, 165), (150, 130, 110)),
    ]
    top, middle, low = (np.array(c, np.float32) for c in skies[rng.integers(len(skies))])
    line = (np.arange(side, dtype=np.float32) / side)[:, None, None]
    horizon = rng.uniform(0.35, 0.6)
    near = np.clip((line - horizon) * 9 + 0.5, 0, 1)
    scene = (top + (middle - top) * np.clip(line / horizon, 0, 1)) * (1 - near) + low * near
    scene = np.broadcast_to(scene, (side, side, 3)) * 1.0
    patches = cv2.resize(
        rng.normal(0, 1, (7, 7, 1)).astype(np.float32), (side, side), interpolation=cv2.INTER_CUBIC
    )
    scene = scene + patches[:, :, None] * 16
    spots = _spots(rng, side, [(70, 62, 40), (60, 66, 50)], 9, 0.05)
    return _screen(scene, spots).astype(np.float32)


def _professional(subject: Subject, rng: np.random.Generator) -> Drawing:
    """Step back, for jacket and collar to show, before a studio's backdrop in soft light."""
    zoom = rng.uniform(0.58, 0.66)
    seen = subject.seen(camera(zoom, rng.normal(0, 0.01), (0, -0.12)), CANVAS)
    side = CANVAS
    x, y = _grid(side)
    walls: list[Colour] = [(112, 120, 134), (128, 122, 114), (92, 104, 124), (140, 142, 146)]
    falloff = np.clip(1.25 - 1.5 * ((x - 0.5) ** 2 + (y - 0.42) ** 2), 0.2, 2)
    grain = _cut(_noise(8, 8, 6), rng, seen.normals * 0, 0, 1.5)
    wall = (falloff + 0.035 * grain)[:, :, None] * np.array(walls[rng.integers(4)], np.float32)
    flat = seen.rgb / np.clip(seen.shade, 0.5, 1.8)[:, :, None] ** 0.55
    grey = grey_of(flat)
    soft = guided(grey, flat / 255, 3, 0.003) * 255
    rgb = _mix(flat, soft, seen.skin * 0.45)
    face = seen.part("oval") > 0.5
    level = float(grey[face].mean())
    rgb = rgb * min(max(0.52 / max(level, 0.1), 0.85), 1.35) ** 0.7
    key = _lit(seen.normals, (0.6 * _side(rng), -0.5, 0.8))
    rgb = rgb * (0.84 + 0.28 * key)[:, :, None]
    suit = np.array(SUITS[rng.integers(len(SUITS))], np.float32)
    own, formal = _recoloured(seen, rgb, suit)
    picture = _mix(wall, _mix(rgb, own, seen.clothes), seen.person)
    if not formal:
        jacket, cover = _suit(seen, suit, rng)
        # Of the person only the face and long hair go over the jacket.
        over = np.maximum(seen.part("oval", 1.0), np.clip(seen.hair * 1.3 - 0.2, 0, 1))
        picture = _mix(picture, jacket, cover * (1 - over))
    return np.clip((picture - 128) * 1.06 + 128, 0, 255), seen.points


def _recoloured(seen: Subject, rgb: np.ndarray, suit: np.ndarray) -> tuple[np.ndarray, bool]:
    """Return the clothes in a suit's colour, and whether they were a dark jacket all along, which
    is then only made calmer. Below the end of a photo, where its last row is repeated, is none."""
    grey = grey_of(rgb)
    worn = seen.clothes > 0.5
    level = float(np.median(grey[worn])) if worn.sum() > 100 else 1.0
    below = grey[min(int(seen.mesh[CHIN, 1]) + CANVAS // 8, CANVAS - 8) :]
    across, down = (np.abs(cv2.Sobel(below, cv2.CV_32F, *axis)).mean() for axis in ((1, 0), (0, 1)))
    if level < 0.27 and down > 0.35 * across:
        return _mix(rgb, grey[:, :, None] * 255, 0.35), True
    tone = np.clip(0.35 + 0.9 * grey / max(level, 0.2), 0.4, 1.9)
    return tone[:, :, None] * suit, False


def _suit(
    seen: Subject, suit: np.ndarray, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Draw jacket, shirt and perhaps a tie under a chin: colour (S, S, 3), cover (S, S)."""
    side = CANVAS
    chin = seen.mesh[CHIN]
    wide = float(np.linalg.norm(seen.mesh[RIGHT_CHEEK] - seen.mesh[LEFT_CHEEK]))
    centre = np.array([chin[0] + 0.25 * (0.5 * side - chin[0]), chin[1]])
    shirt = np.array(
        [(238, 240, 244), (200, 216, 238), (240, 236, 230)][rng.integers(3)], np.float32
    )

    def at(*pairs: tuple[float, float]) -> np.ndarray:
        return centre + np.array(pairs) * wide

    def both(*pairs: tuple[float, float]) -> list[np.ndarray]:
        return [at(*pairs), at(*((-x, y) for x, y in pairs))]

    base = rng.uniform(0.05, 0.11)
    body = at(
        (-0.40, base + 0.02),
        (-0.62, base + 0.17),
        (-1.05, base + 0.33),
        (-1.3, base + 0.62),
        (-1.45, 3),
        (1.45, 3),
        (1.3, base + 0.62),
        (1.05, base + 0.33),
        (0.62, base + 0.17),
        (0.40, base + 0.02),
        (0.0, base + 0.62),
    )
    cover = polygon(body, side, 0.8)
    cloth = _cut(_noise(128, 128, 7), rng, seen.normals * 0, 0, 2.0)
    x, _ = _grid(side)
    across = (x * side - centre[0]) / wide
    fold = 1.12 - 0.32 * across**2 + 0.05 * cloth
    colour = suit * np.clip(fold, 0.5, 1.4)[:, :, None]
    # The shirt's opening, its two collar points, the lapels' edges.
    opening = at(
        (-0.36, base),
        (-0.40, base + 0.06),
        (0.0, base + 1.15),
        (0.40, base + 0.06),
        (0.36, base),
        (0.0, base + 0.40),
    )
    linen = polygon(opening, side, 0.7)
    colour = _mix(colour, shirt, linen)
    cover = np.maximum(cover, linen)
    if rng.random() < 0.6:
        ties: list[Colour] = [
            (120, 26, 36),
            (34, 52, 110),
            (60, 60, 66),
            (40, 84, 70),
            (110, 80, 40),
        ]
        knot = at(
            (-0.085, base + 0.37),
            (0.085, base + 0.37),
            (0.06, base + 0.52),
            (0.13, base + 1.3),
            (-0.13, base + 1.3),
            (-0.06, base + 0.52),
        )
        tie = polygon(knot, side, 0.6)
        stripe = 0.88 + 0.2 * (np.sin(across * 40 + _grid(side)[1] * 60) > 0.3)
        colour = _mix(
            colour, np.array(ties[rng.integers(5)], np.float32) * stripe[:, :, None], tie * linen
        )
    for collar in both(
        (-0.36, base - 0.03), (-0.42, base + 0.08), (-0.22, base + 0.50), (0.0, base + 0.36)
    ):
        leaf = polygon(collar, side, 0.6)
        shadow = polygon(collar + np.array([0, 0.035 * wide]), side, 1.8)
        colour = _mix(colour, colour * 0.72, np.clip(shadow - leaf, 0, 1) * linen)
        colour = _mix(colour, shirt * 1.0, leaf)
        cover = np.maximum(cover, leaf)
    for lapel in both(
        (-0.40, base + 0.04),
        (-0.60, base + 0.26),
        (-0.52, base + 0.55),
        (-0.62, base + 0.6),
        (0.0, base + 1.25),
        (-0.12, base + 0.95),
    ):
        leaf = polygon(lapel, side, 0.7)
        rim = np.clip(polygon(lapel, side, 1.6) - leaf, 0, 1)
        colour = _mix(colour, suit * 1.22 + 6, leaf * 0.9)
        colour = colour * (1 - 0.5 * rim)[:, :, None]
        cover = np.maximum(cover, leaf)
    return colour.astype(np.float32), cover


def _rockstar(subject: Subject, rng: np.random.Generator) -> Drawing:
    """Stand on a stage: a coloured light from either side, dark between, paint on the face or wild
    hair."""
    seen = subject.close
    side = CANVAS
    x, y = _grid(side)
    pairs: list[tuple[Colour, Colour]] = [
        ((1.30, 0.25, 0.85), (0.15, 0.70, 1.35)),
        ((1.35, 0.30, 0.20), (0.25, 0.40, 1.40)),
        ((1.20, 0.30, 1.15), (0.15, 1.10, 0.95)),
        ((1.30, 0.75, 0.15), (0.70, 0.20, 1.30)),
    ]
    left, right = pairs[rng.integers(len(pairs))]
    if rng.random() < 0.5:
        left, right = right, left
    stage = np.array([20, 13, 32], np.float32) * (1.2 - 0.6 * y)[:, :, None]
    for colour, place in ((left, 0.02), (right, 0.98)):
        cx, cy = place + rng.normal(0, 0.06), rng.uniform(-0.05, 0.3)
        glow = np.exp(-((x - cx) ** 2 + (y - cy) ** 2) / 0.05)
        angle = np.arctan2(x - cx, y - cy + 0.25) - (0.5 - place) * rng.uniform(0.4, 1.1)
        beam = np.exp(-((angle / 0.13) ** 2)) * np.clip(1.1 - y, 0, 1)
        stage = stage + (130 * glow + 75 * beam)[:, :, None] * np.array(colour, np.float32)
    flat = seen.rgb / np.clip(seen.shade, 0.45, 2)[:, :, None] ** 0.6
    level = float(grey_of(flat)[seen.part("oval") > 0.5].mean())
    flat = flat * min(max(0.55 / max(level, 0.05), 0.8), 1.9)
    wild = rng.random()
    if wild < 0.45 or seen.hair.mean() < 0.02:
        flat = _face_paint(seen, flat, rng)
    else:
        hues: list[Colour] = [
            (255, 40, 150),
            (40, 220, 240),
            (70, 235, 90),
            (170, 70, 255),
            (255, 90, 30),
        ]
        ink = np.array(hues[rng.integers(5)], np.float32)
        strands = np.clip(0.62 + 0.75 * seen.drawing, 0.18, 1.3)
        flat = _mix(flat, ink * strands[:, :, None], np.clip(seen.hair * 1.1, 0, 1) * 0.92)
    liner = np.clip(_eyes(seen, 2.2) - 0.75 * _eyes(seen, 0.8), 0, 1)
    flat = flat * (1 - 0.75 * liner)[:, :, None]
    flat = _mix(flat, flat * 0.32, seen.clothes)
    grain = _bumped(seen.normals, seen.drawing, 0.5)
    a, b = _lit(grain, (-0.95, -0.15, 0.42)), _lit(grain, (0.95, -0.15, 0.42))
    front = _lit(grain, (0.0, -0.4, 1.0))
    light = (0.10 + 0.42 * front**2)[:, :, None] * np.array([0.86, 0.80, 0.95], np.float32)
    light = light + 1.15 * a[:, :, None] * np.array(left, np.float32)
    light = light + 1.15 * b[:, :, None] * np.array(right, np.float32)
    rgb = flat * light
    for direction, colour in (((-0.9, -0.2, 0.5), left), ((0.9, -0.2, 0.5), right)):
        shine = _shiny(grain, direction, 14) * (seen.skin + 0.7 * seen.clothes)
        rgb = _screen(rgb, 95 * shine[:, :, None] * np.array(colour, np.float32))
    picture = _mix(stage, rgb, seen.person)
    haze = np.exp(-(((y - 1.05) / 0.22) ** 2))[:, :, None] * (np.array(left) + np.array(right)) * 22
    return _screen(picture, haze), seen.points


def _face_paint(seen: Subject, rgb: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Paint a band over the eyes, a lightning bolt or a star, thin enough for the eyes to show."""
    side = CANVAS
    mesh = seen.mesh
    right, left = (mesh[PARTS[f"{name}_eye"]].mean(axis=0) for name in ("right", "left"))
    span = left - right
    across, down = span / np.linalg.norm(span), np.array([-span[1], span[0]]) / np.linalg.norm(span)
    unit = float(np.linalg.norm(span))

    def at(origin: np.ndarray, *pairs: tuple[float, float]) -> np.ndarray:
        return origin + np.array([px * across * unit + py * down * unit for px, py in pairs])

    inks: list[Colour] = [
        (235, 30, 45),
        (20, 20, 28),
        (40, 90, 245),
        (250, 250, 250),
        (250, 200, 30),
    ]
    ink = np.array(inks[rng.integers(5)], np.float32)
    kind = rng.integers(3)
    if kind == 0:
        middle = (right + left) / 2
        shape = polygon(
            at(
                middle,
                (-1.3, -0.16),
                (0, -0.2),
                (1.3, -0.16),
                (1.3, 0.12),
                (0.2, 0.17),
                (0, 0.24),
                (-0.2, 0.17),
                (-1.3, 0.12),
            ),
            side,
            1.0,
        )
        shape *= seen.part("oval", 1.5)
    elif kind == 1:
        eye = (right, left)[rng.integers(2)]
        turn = _side(rng)
        bolt = [
            (0.1, -0.95),
            (0.5, -0.95),
            (0.2, -0.3),
            (0.45, -0.3),
            (-0.25, 0.95),
            (-0.02, 0.1),
            (-0.3, 0.1),
        ]
        shape = polygon(at(eye, *((px * turn, py) for px, py in bolt)), side, 0.9)
    else:
        eye = (right, left)[rng.integers(2)]
        angles = np.arange(10) * math.pi / 5 - math.pi / 2
        radii = np.where(np.arange(10) % 2, 0.26, 0.62)
        star = [(r * math.cos(t), r * math.sin(t)) for r, t in zip(radii, angles, strict=True)]
        shape = polygon(at(eye, *star), side, 0.9)
    shape = shape * (1 - 0.9 * _eyes(seen, 1.2)) * np.clip(1.1 - seen.hair, 0, 1)
    drawing = np.clip(1 + 0.8 * seen.drawing, 0.35, 1.5)
    return _mix(rgb, ink * drawing[:, :, None], shape * 0.8)


def _popart(subject: Subject, rng: np.random.Generator) -> Drawing:
    """Print in flat inks with dark lines: the face in three shades by quantile, hair and clothes
    each in an ink of its own, dots on the ground."""
    seen = subject.close
    side = CANVAS
    x, y = _grid(side)
    ground, second, third = (
        POP_PALETTES[rng.integers(len(POP_PALETTES))][i].astype(np.float32) for i in range(3)
    )
    dark = np.array([25, 15, 35], np.float32)
    grey = grey_of(seen.rgb) / np.clip(seen.shade, 0.5, 2) ** 0.5
    grey = guided(grey, grey, 4, 0.002)
    grey = cv2.GaussianBlur(grey, (0, 0), side / 150)
    face = (seen.part("oval") > 0.5) & (seen.skin > 0.5)
    steps = np.quantile(grey[face], [0.10, 0.34, 0.62]) if face.any() else [0.2, 0.4, 0.6]
    shades = [
        dark,
        second,
        _blend(second, (255, 236, 214), 0.62),
        np.array([255, 240, 222], np.float32),
    ]
    picture = np.broadcast_to(ground, (side, side, 3)).astype(np.float32)
    turn = 0.6
    u, v = x * math.cos(turn) + y * math.sin(turn), y * math.cos(turn) - x * math.sin(turn)
    waves = np.sin(u * 2 * math.pi * 17) * np.sin(v * 2 * math.pi * 17)
    dots = np.clip((waves - 0.25) * 6, 0, 1)
    picture = _mix(picture, ground * 0.72, dots)
    skin = _inks(grey, steps, shades)
    halftone = np.clip((waves - 0.1) * 5, 0, 1) * np.clip((steps[1] + 0.06 - grey) * 14, 0, 1)
    skin = _mix(skin, third, halftone * 0.35 * (grey > steps[0]))
    picture = _mix(picture, skin, _hard(seen.skin))
    hair_tone = grey - blur(grey, 0.05)
    hair = _inks(hair_tone, [-0.035, 0.03], [dark, third, _blend(third, (255, 255, 255), 0.45)])
    picture = _mix(picture, hair, _hard(seen.hair))
    cloth = _inks(
        hair_tone,
        [-0.05, 0.05],
        [dark, ground * 0.55 + second * 0.45, _blend(ground, (255, 255, 255), 0.4)],
    )
    picture = _mix(picture, cloth, _hard(seen.clothes))
    lips = np.clip(seen.part("lips", 0.8) - seen.part("mouth", 0.8), 0, 1)
    picture = _mix(picture, (225, 30, 60), _hard(lips) * (grey > steps[0] * 0.8) * 0.85)
    eyes = _eyes(seen, 0.7)
    white = np.quantile(grey[eyes > 0.5], 0.5) if (eyes > 0.5).sum() > 8 else steps[1]
    picture = _mix(picture, (255, 252, 245), _hard(eyes) * np.clip((grey - white) * 40, 0, 1))
    # Lines where brightness falls off quickly, as a brush draws them.
    sharp = grey_of(seen.rgb)
    edge = cv2.GaussianBlur(sharp, (0, 0), 1.1) - 0.985 * cv2.GaussianBlur(sharp, (0, 0), 3.2)
    spread = float(edge[face].std()) if face.any() else 0.05
    line = np.clip((-edge / max(spread, 0.012) - 0.75) * 1.6, 0, 1) * np.clip(
        seen.skin + 0.3 * seen.hair, 0, 1
    )
    picture = _mix(picture, dark, line * 0.92)
    rim = np.clip(1 - np.abs(cv2.GaussianBlur(seen.person, (0, 0), 1.0) - 0.5) * 3.2, 0, 1)
    return _mix(picture, dark, rim * 0.9), seen.points


def _blend(a: np.ndarray, b: Colour, share: float) -> np.ndarray:
    return a + (np.array(b, np.float32) - a) * share


def _hard(mask: np.ndarray) -> np.ndarray:
    return np.clip((mask - 0.5) * 5 + 0.5, 0, 1)


def _inks(value: np.ndarray, steps: np.ndarray | list[float], inks: list[np.ndarray]) -> np.ndarray:
    """Give every value the ink between its steps, edges a pixel wide."""
    picture = np.broadcast_to(inks[0], (*value.shape, 3)).astype(np.float32)
    for step, ink in zip(steps, inks[1:], strict=True):
        picture = _mix(picture, ink, np.clip((value - step) * 60 + 0.5, 0, 1))
    return picture


def _statue(seen: Subject, rng: np.random.Generator, calm: float) -> tuple[np.ndarray, np.ndarray]:
    """Carve: return the surface's directions and the depth of its drawing (S, S).

    `calm` is how much of the colours of eyes and brows, which stone does not have, is left out.
    """
    detail = seen.drawing
    brows = np.maximum(seen.part("right_brow", 2.5), seen.part("left_brow", 2.5))
    detail = detail * (1 - calm * np.maximum(_eyes(seen, 1.5), brows))
    return _bumped(seen.normals, cv2.GaussianBlur(detail, (0, 0), 0.8), 2.6), detail


def _gallery(rng: np.random.Generator, colour: Colour) -> np.ndarray:
    """Paint a museum's wall: lit from above on one side."""
    x, y = _grid(CANVAS)
    pool = np.exp(-(((x - rng.uniform(0.2, 0.8)) / 0.6) ** 2) - ((y - 0.25) / 0.7) ** 2)
    return (0.55 + 0.75 * pool)[:, :, None] * np.array(colour, np.float32)


def _marble(subject: Subject, rng: np.random.Generator) -> Drawing:
    seen = subject.close
    normals, detail = _statue(seen, rng, 0.35)
    light = (_side(rng) * rng.uniform(0.4, 0.8), -0.75, 0.75)
    shade = 0.21 + 0.52 * _lit(normals, light) + 0.10 * _lit(normals, (-light[0], 0.2, 0.6))
    own = np.clip(seen.shade, 0.5, 1.5) ** 0.35
    tone = (
        shade
        * np.exp(0.9 * np.clip(detail, -1.4, 0.6))
        * _mix(np.ones_like(own)[:, :, None], own[:, :, None], seen.skin)[:, :, 0]
    )
    veins = _cut(_veins(), rng, seen.normals, 14, 1.2)
    tone = tone * (1 - 0.22 * veins)
    stone = _ramp(
        tone,
        [
            (0, (52, 50, 52)),
            (0.3, (124, 120, 120)),
            (0.62, (206, 202, 197)),
            (0.9, (248, 245, 240)),
            (1, (255, 254, 251)),
        ],
    )
    stone = _screen(stone, 70 * _shiny(normals, light, 30)[:, :, None] * np.ones(3))
    walls: list[Colour] = [(104, 108, 118), (84, 88, 96), (118, 112, 106), (70, 78, 96)]
    return _mix(_gallery(rng, walls[rng.integers(4)]), stone, seen.person), seen.points


def _bronze(subject: Subject, rng: np.random.Generator) -> Drawing:
    seen = subject.close
    normals, detail = _statue(seen, rng, 0.25)
    side = _side(rng)
    light = (side * rng.uniform(0.4, 0.8), -0.7, 0.7)
    own = np.clip(seen.shade, 0.5, 1.5) ** 0.3
    tone = 0.10 + 0.50 * _lit(normals, light) * own + 0.12 * _lit(normals, (-0.9 * side, 0.0, 0.4))
    # Metal mirrors its room: a bright window above, a dark floor.
    up = -normals[:, :, 1]
    tone = tone + 0.10 * np.clip(np.sin(up * 5.5 + 0.6), 0, 1)
    tone = tone * np.exp(1.0 * np.clip(detail, -1.3, 0.9))
    metal = _ramp(
        tone,
        [
            (0, (20, 11, 8)),
            (0.22, (74, 42, 22)),
            (0.48, (146, 92, 46)),
            (0.75, (214, 156, 88)),
            (1, (252, 220, 160)),
        ],
    )
    patina = np.clip(
        _cut(_noise(8, 8, 8), rng, seen.normals, 10, 1.4) * 0.5 + 0.1 - 1.4 * detail, 0, 1
    )
    metal = _mix(
        metal,
        _ramp(tone, [(0, (14, 26, 24)), (0.5, (72, 122, 104)), (1, (170, 205, 180))]),
        patina * rng.uniform(0.1, 0.4),
    )
    shine = _shiny(normals, light, 22) + 0.5 * _shiny(normals, (-0.9 * side, -0.3, 0.5), 18)
    metal = _screen(metal, 150 * shine[:, :, None] * np.array([1.0, 0.82, 0.55]))
    walls: list[Colour] = [(70, 85, 95), (92, 92, 90), (58, 66, 78), (88, 78, 74)]
    return _mix(_gallery(rng, walls[rng.integers(4)]), metal, seen.person), seen.points


def _barked(subject: Subject, rng: np.random.Generator) -> Drawing:
    """Grow bark over the skin: its cracks follow the face, whose drawing stays; the eyes stay
    eyes."""
    seen = subject.close
    side = CANVAS
    detail = seen.drawing
    features = np.clip(_eyes(seen, 3.0) + seen.part("lips", 3.0), 0, 1)
    # What tells people apart lies between brows and chin: cracks are shallower there.
    core = np.concatenate([seen.mesh[PARTS[n]] for n in ("right_brow", "left_brow", "lips")])
    middle = polygon(cv2.convexHull(core.astype(np.float32))[:, 0], side, 5.0)
    calm = np.maximum(0.75 * features, 0.45 * middle)
    height = _cut(_bark(), rng, seen.normals, 26, rng.uniform(1.1, 1.5))
    height = height + (0.58 - height) * calm
    normals = _bumped(seen.normals, cv2.GaussianBlur(detail, (0, 0), 1.0), 1.8)
    normals = _bumped(normals, height, 2.2)
    light = (_side(rng) * rng.uniform(0.3, 0.8), -0.7, 0.7)
    own = np.clip(seen.shade, 0.5, 1.6) ** 0.4
    tone = (0.24 + 0.62 * _lit(normals, light)) * own * (0.42 + 0.72 * height)
    tone = tone * np.exp(1.2 * np.clip(detail, -1.3, 0.8))
    woods: list[list[tuple[float, Colour]]] = [
        [
            (0, (22, 13, 8)),
            (0.25, (72, 47, 29)),
            (0.5, (128, 92, 60)),
            (0.78, (186, 148, 106)),
            (1, (228, 200, 160)),
        ],
        [
            (0, (20, 16, 13)),
            (0.25, (66, 56, 46)),
            (0.5, (118, 104, 86)),
            (0.78, (172, 158, 134)),
            (1, (220, 208, 184)),
        ],
    ]
    wood = _ramp(tone, woods[rng.integers(2)])
    mossy = _cut(_noise(8, 8, 9), rng, seen.normals, 10, 1.5) + 0.8 * seen.hair - 0.7 * features
    moss = np.clip((mossy - 1.15 * seen.skin - 0.55) * 2.5, 0, 1) * np.clip(0.35 + height, 0, 1)
    green = _ramp(tone, [(0, (12, 20, 8)), (0.4, (66, 92, 34)), (1, (168, 190, 96))])
    picture = _mix(wood, green, moss * 0.75)
    leaves = _cut(_noise(64, 64, 10), rng, seen.normals, 8, 1.3)
    leafy = _ramp(
        np.clip(0.45 + 0.22 * leaves + 0.6 * detail, 0, 1),
        [(0, (14, 26, 10)), (0.5, (62, 102, 36)), (1, (158, 190, 84))],
    )
    picture = _mix(picture, leafy, np.clip(seen.hair, 0, 1) * 0.72)
    eyes = _eyes(seen, 0.9)
    bright = seen.rgb * np.clip(
        0.42
        / max(float(grey_of(seen.rgb)[eyes > 0.5].mean()) if (eyes > 0.5).any() else 0.4, 0.08),
        0.8,
        1.8,
    )
    picture = _mix(picture, bright, eyes * 0.85)
    mouth = seen.part("mouth", 0.7)
    picture = _mix(picture, seen.rgb * 0.8, mouth * 0.8)
    woodland = _woodland(rng, side)
    return _mix(woodland, picture, seen.person), seen.points


def _woodland(rng: np.random.Generator, side: int) -> np.ndarray:
    """Paint a wood out of focus."""
    x, y = _grid(side)
    tops: list[Colour] = [(104, 138, 78), (84, 120, 84), (128, 140, 84)]
    scene = np.array(tops[rng.integers(3)], np.float32) * (1.25 - 0.75 * y)[:, :, None]
    for _ in range(3):
        at, thick = rng.uniform(0, 1), rng.uniform(0.03, 0.08)
        trunk = np.exp(-(((x - at) / thick) ** 4))
        scene = _mix(scene, (58, 52, 38), 0.55 * trunk)
    scene = _screen(scene, _spots(rng, side, [(60, 80, 26), (84, 84, 40)], 12, 0.045))
    return cv2.GaussianBlur(scene.astype(np.float32), (0, 0), 2.0)


def _pixar(subject: Subject, rng: np.random.Generator) -> Drawing:
    """Draw a film's character: large bright eyes, a small nose, smooth skin, deep colour."""
    seen = subject.close
    side = CANVAS
    rgb = seen.rgb
    grey = grey_of(rgb)
    face = seen.part("oval") > 0.5
    rgb = rgb / np.clip(seen.shade, 0.6, 1.7)[:, :, None] ** 0.4
    level = float(grey_of(rgb)[face].mean())
    rgb = 255 * np.clip(rgb / 255, 0, 1) ** min(
        max(math.log(0.60) / math.log(max(level, 0.08)), 0.55), 1.1
    )
    eyes, lips = _eyes(seen, 1.5), seen.part("lips", 2.0)
    brows = np.maximum(seen.part("right_brow", 2.0), seen.part("left_brow", 2.0))
    keep = np.clip(eyes + lips + 0.8 * brows, 0, 1)
    grey = grey_of(rgb)
    smooth = guided(grey, rgb / 255, 7, 0.008) * 255
    clumps = guided(grey, rgb / 255, 4, 0.006) * 255
    clumps = clumps + (clumps - blur(clumps, 0.02)) * 0.9
    rgb = _mix(_mix(smooth, clumps, 1 - seen.skin), rgb, keep * 0.8)
    rgb = _saturate(rgb, 1.28)
    key = _lit(seen.normals, (0.5 * _side(rng), -0.6, 0.75))
    rgb = rgb * (0.80 + 0.34 * key)[:, :, None]
    mesh = seen.mesh
    x, y = _grid(side)
    wide = float(np.linalg.norm(mesh[RIGHT_CHEEK] - mesh[LEFT_CHEEK]))
    for index in (50, 280, NOSE):  # cheeks and the nose's tip blush
        away = ((x * side - mesh[index, 0]) ** 2 + (y * side - mesh[index, 1]) ** 2) / (
            0.15 * wide
        ) ** 2
        rgb = _mix(
            rgb, rgb * np.array([1.05, 0.90, 0.90], np.float32), np.exp(-away) * seen.skin * 0.7
        )
    rim = np.clip(1 - seen.normals[:, :, 2], 0, 1) ** 2
    rims: list[Colour] = [(120, 170, 255), (255, 190, 120), (190, 150, 255)]
    rgb = _screen(rgb, rim[:, :, None] * np.array(rims[rng.integers(3)]) * 0.5)
    gloss = _shiny(seen.normals, (-0.35, -0.55, 0.8), 26) * seen.skin * (1 - keep)
    rgb = _screen(rgb, 60 * gloss[:, :, None] * np.array([1.0, 0.95, 0.88]))
    rgb = _irises(seen, rgb)
    skies: list[tuple[Colour, Colour]] = [
        ((255, 205, 130), (240, 130, 100)),
        ((140, 205, 255), (90, 130, 225)),
        ((175, 235, 170), (70, 165, 150)),
        ((215, 180, 255), (130, 110, 215)),
    ]
    top, low = (np.array(c, np.float32) for c in skies[rng.integers(4)])
    scene = top + (low - top) * y[:, :, None]
    scene = _screen(scene, _spots(rng, side, [(70, 66, 60)], 8, 0.06))
    picture = _mix(scene, rgb, seen.person)
    return _cartoon(picture.astype(np.float32), seen, rng)


def _irises(seen: Subject, rgb: np.ndarray) -> np.ndarray:
    """Brighten the whites of the eyes, deepen and colour the irises, line the lids; closed eyes and
    those behind dark glasses stay as they are."""
    plain, rgb = rgb, rgb.copy()
    cheek = float(np.median(grey_of(seen.rgb)[seen.skin > 0.9])) if (seen.skin > 0.9).any() else 0.5
    for name in ("right_eye", "left_eye"):
        outline = seen.mesh[PARTS[name]]
        wide, high = (float(v) for v in np.ptp(outline, axis=0))
        left, top = np.maximum(outline.min(axis=0).astype(int) - 6, 0).tolist()
        side = int(wide) + 14
        box = slice(top, top + side), slice(left, left + side)
        part, grey = rgb[box], grey_of(seen.rgb[box])
        if part.shape[:2] != (side, side):  # an eye beyond the edge of the picture
            continue
        outline = outline - [left, top]
        opening = polygon(outline, side, 0.7)
        inner = opening > 0.5
        if high < 0.16 * wide or inner.sum() < 12 or np.quantile(grey[inner], 0.85) < 0.65 * cheek:
            return plain
        x, y = (axis * side for axis in _grid(side))
        dark = np.clip(np.quantile(grey[inner], 0.45) - grey, 0, None) * inner
        middle = outline.mean(axis=0)
        centre = np.array([(dark * x).sum(), (dark * y).sum()]) / (float(dark.sum()) + 1e-6)
        centre = middle + np.clip(centre - middle, -0.22 * wide, 0.22 * wide) * [1, 0.5]
        away = np.hypot(x - centre[0], y - centre[1]) / (0.26 * wide)
        iris = np.clip((1.05 - away) * 6, 0, 1) * opening
        core = (away < 0.9) & inner
        colour = np.median(part[core], axis=0) if core.any() else np.array([80, 60, 40])
        colour = _saturate(colour.astype(np.float32)[None, None], 1.9)[0, 0]
        colour = np.clip(colour * 1.4 + 16, 0, 210)
        white = part * 0.45 + 148 * np.array([1, 0.98, 0.96], np.float32)
        part = _mix(part, white, opening * (1 - iris) * 0.72)
        ring = np.clip(1.25 - 0.75 * away, 0.4, 1.2) * np.where(y > centre[1], 1.3, 0.85)
        part = _mix(part, colour * ring[:, :, None], iris * 0.85)
        part = _mix(part, (14, 10, 12), np.clip((0.45 - away) * 7, 0, 1) * opening)
        glint = np.hypot(x - centre[0] + 0.10 * wide, y - centre[1] + 0.11 * wide)
        part = _mix(part, (255, 255, 255), np.clip((0.085 * wide - glint) * 1.2, 0, 1))
        lid = np.clip(polygon(outline - [0, 0.05 * wide], side, 0.9) - opening, 0, 1)
        rgb[box] = _mix(part, (34, 22, 22), lid * 0.75)
    return rgb


def _cartoon(picture: np.ndarray, seen: Subject, rng: np.random.Generator) -> Drawing:
    """Enlarge the eyes, shrink the nose, round the cheeks and narrow the chin."""
    side = CANVAS
    mesh = seen.mesh
    wide = float(np.linalg.norm(mesh[RIGHT_CHEEK] - mesh[LEFT_CHEEK]))
    right, left = (mesh[PARTS[f"{name}_eye"]].mean(axis=0) for name in ("right", "left"))
    gain = rng.uniform(0.34, 0.42)
    bulges = [
        (right, 0.235 * wide, gain),
        (left, 0.235 * wide, gain),
        (mesh[NOSE] * 0.8 + mesh[2] * 0.2, 0.21 * wide, -0.24),
        (mesh[CHIN], 0.24 * wide, -0.12),
    ]
    x, y = _grid(side)
    u, v = x * side - 0.5, y * side - 0.5
    u0, v0 = u.copy(), v.copy()
    for centre, reach, strength in bulges:
        dx, dy = u0 - centre[0], v0 - centre[1]
        pull = strength * np.clip(1 - (dx**2 + dy**2) / reach**2, 0, 1) ** 1.5
        u, v = u - dx * pull, v - dy * pull
    warped = cv2.remap(
        picture,
        u.astype(np.float32),
        v.astype(np.float32),
        cv2.INTER_CUBIC,
        None,
        cv2.BORDER_REFLECT_101,
    )
    return warped, seen.points


_PAINTERS: dict[str, Callable[[Subject, np.random.Generator], Drawing]] = {
    "portrait": _portrait,
    "selfie": _selfie,
    "pixar": _pixar,
    "bark": _barked,
    "rockstar": _rockstar,
    "professional": _professional,
    "popart": _popart,
    "marble": _marble,
    "bronze": _bronze,
}
