"""Draw a person with OpenGL on EGL: vertices, textures and lights to a picture, on any CPU."""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from registry.errors import HdbError
from registry.tiny.recipe import shaders
from registry.tiny.recipe.assets import read_image
from registry.tiny.recipe.head import HAT, LASHES, Head, Proxy, Surface, triangles
from registry.tiny.recipe.person import Person

MATERIALS = {"natural": 0, "bark": 1, "marble": 2, "bronze": 3}
SKIN, HAIR, EYES, CLOTH = range(4)
# Hair that would grow through a hat is worn as this under one.
UNDER_HAT = {"Braid01": "ponytail01", "long01": "ponytail01", "afro01": "short01"}
NO_PAINT = (0.0, 0.0, 0.0, 0.0)


@dataclass(frozen=True)
class View:
    """Camera and light. Angles in radians; `eyes` is where the midpoint of the eyes lands, in
    -1..1, y up."""

    yaw: float = 0.0
    pitch: float = 0.0
    roll: float = 0.0
    light: tuple[float, float, float] = (0.4, 0.5, 0.8)
    key: tuple[float, float, float] = (0.85, 0.82, 0.78)
    ambient: tuple[float, float, float] = (0.38, 0.38, 0.42)
    fill: tuple[float, float, float] = (0.16, 0.17, 0.20)
    field: float = 18.0  # degrees; a selfie's is wide
    zoom: float = 1.46
    eyes: tuple[float, float] = (0.0, 0.16)


@dataclass(frozen=True)
class Look:
    """What a style changes about the person's surface."""

    material: str = "natural"
    smooth: bool = False
    cartoon: float = 0.0
    paint: tuple[float, float, float, float] = NO_PAINT
    jacket: bool = False
    expression: Mapping[str, float] | None = None
    sliders: Mapping[str, float] | None = None


@dataclass(frozen=True)
class _Part:
    vertices: np.ndarray  # (V, 8) position, normal, uv
    indices: np.ndarray
    image: Any
    kind: int
    tint: tuple[float, float, float]
    gloss: float


class Renderer:
    """An OpenGL context with the head's textures; `draw` gives RGB and coverage."""

    def __init__(self, head: Head, materials: Path, size: int, supersample: int = 3) -> None:
        os.environ.setdefault("LP_NUM_THREADS", "0")  # one process a core beats one renderer on all
        try:
            import moderngl

            self.gl = moderngl.create_context(standalone=True, backend="egl")
        except Exception as error:  # moderngl raises bare Exception where EGL is missing
            raise HdbError(
                f"the renderer needs moderngl and EGL ({error}); on Debian: "
                "pip install moderngl; apt install libegl1 libgl1-mesa-dri libgl1"
            ) from error
        self.head, self.materials, self.size = head, materials, size
        self.pixels = size * supersample
        self.program = self.gl.program(
            vertex_shader=shaders.VERTEX, fragment_shader=shaders.FRAGMENT
        )
        self.frame = self.gl.framebuffer(
            [self.gl.renderbuffer((self.pixels, self.pixels), 4)],
            self.gl.depth_renderbuffer((self.pixels, self.pixels)),
        )
        self._textures: dict[object, Any] = {}
        self._meshes: dict[str, tuple[np.ndarray, ...]] = {}
        self.lips = _lips(head)
        self.beard = _beard_mask(head, self.lips)

    def draw(self, person: Person, view: View, look: Look) -> tuple[np.ndarray, np.ndarray]:
        """Return colour premultiplied by coverage (S, S, 3) in 0..255, and coverage (S, S, 1) in
        0..1."""
        parts, eye = self._build(person, look)
        self._aim(view, look, eye)
        gl = self.gl
        self.frame.use()
        gl.enable(gl.DEPTH_TEST)
        gl.disable(gl.CULL_FACE)
        self.frame.clear(0, 0, 0, 0)
        for part in parts:
            self._draw_part(part)
        data = np.frombuffer(self.frame.read(components=4), np.uint8)
        picture: np.ndarray = data.reshape(self.pixels, self.pixels, 4)[::-1].astype(np.float32)
        picture = cv2.resize(picture, (self.size, self.size), interpolation=cv2.INTER_AREA)
        return picture[:, :, :3], picture[:, :, 3:] / 255

    def forget(self, person: Person) -> None:
        """Free the person's own textures."""
        for key in [k for k in self._textures if isinstance(k, tuple) and k[1] == person.seed]:
            self._textures.pop(key).release()

    def _build(self, person: Person, look: Look) -> tuple[list[_Part], np.ndarray]:
        head, folder = self.head, self.materials / "proxies"
        vertices = head.shape(person, look.expression or {}, look.sliders or {})
        if look.cartoon:
            eyes = head.fit(head.proxies["eyes"], vertices)
            vertices = _cartoon(vertices, eyes, look.cartoon)
        key = ("skin", person.seed, look.smooth)
        if key not in self._textures:
            self._upload(key, self._skin(person, look.smooth))
        if "white" not in self._textures:
            self._upload("white", np.full((4, 4, 3), 255, np.uint8))
        parts = [
            self._part("skin", head.skin, vertices, self._textures[key], SKIN, person.tone, 0.10),
            self._part(
                "shirt", head.shirt, vertices, self._textures["white"], CLOTH, person.shirt, 0.02
            ),
        ]

        def add(name: str, image: Path, kind: int, tint: tuple, gloss: float) -> None:
            if image not in self._textures:
                self._upload(image, _read_image(image))
            proxy = head.proxies[name]
            fitted = head.fit(proxy, vertices)
            texture = self._textures[image]
            parts.append(self._part(name, proxy, fitted, texture, kind, tint, gloss))

        iris = folder / f"eyes/Low-Poly/textures/{person.eyes}_eye.png"
        white = (0.62, 0.78, 0.80) if person.eyes == "brown" else (0.9, 0.9, 0.9)
        add("eyes", iris, EYES, white, 0.9)
        brow = f"eyebrow{person.brow:03d}"
        dark = tuple(0.7 * c + 0.01 for c in person.hair_colour)
        add(f"brow{person.brow}", folder / f"eyebrows/{brow}/textures/{brow}.png", HAIR, dark, 0.0)
        add("lashes", _only(folder / f"eyelashes/{LASHES}/textures"), HAIR, (0.02,) * 3, 0.0)
        if person.glasses:
            lenses = _only(folder / "clothes/glasses/textures")
            if lenses not in self._textures:
                self._upload(lenses, _clear_lenses(_read_image(lenses)))
            add("glasses", lenses, HAIR, (0.12,) * 3, 0.4)
        if person.hat:
            felt = folder / f"clothes/{HAT}/textures/fedora_texture_grey.png"
            add("hat", felt, HAIR, person.hat, 0.02)
        hair = UNDER_HAT.get(person.hair or "", person.hair) if person.hat else person.hair
        if hair:
            add(hair, _only(folder / f"hair/{hair}/textures"), HAIR, person.hair_colour, 0.18)
        return parts, head.fit(head.proxies["eyes"], vertices).mean(0)

    def _skin(self, person: Person, smooth: bool) -> np.ndarray:
        """Blend the skins of the person's races, then add lipstick and beard."""
        skins = {
            race: _read_image(_skin_file(self.materials, person.skin_age, race, person.male))
            for race in person.races
        }
        mixed = sum(w * skins[race].astype(np.float32) for race, w in person.races.items()) / 255
        image: np.ndarray = 0.6 * mixed + 0.4 * skins[person.main_race].astype(np.float32) / 255
        if smooth:
            blurred = cv2.GaussianBlur(image.astype(np.float32), (0, 0), 2.2)
            image = cv2.bilateralFilter(blurred, 7, 0.2, 5)
        lips = self.lips[:, :, None] * person.lipstick
        image = image * (1 - lips) + lips * np.array([0.62, 0.16, 0.20], np.float32)
        if person.beard > 0.02:
            rng = np.random.default_rng([person.seed, 11])
            grain = cv2.GaussianBlur(rng.random((512, 512)).astype(np.float32), (0, 0), 0.6)
            cover = self.beard * person.beard * (0.55 + 0.45 * grain) * 1.1
            cover = np.clip(cover, 0, 0.8)[:, :, None]
            image = image * (1 - cover) + cover * np.array(person.hair_colour, np.float32) * 0.8
        return (np.clip(image, 0, 1) * 255).astype(np.uint8)

    def _part(
        self,
        name: str,
        mesh: Proxy | Surface,
        vertices: np.ndarray,
        image: Any,
        kind: int,
        tint: tuple,
        gloss: float,
    ) -> _Part:
        """Give the mesh one vertex per (position, uv) pair, with smooth normals."""
        if name not in self._meshes:
            corners, uv_corners = triangles(mesh.faces), triangles(mesh.uv_faces)
            pairs = corners.astype(np.int64) * 1_000_003 + uv_corners
            _, first, indices = np.unique(pairs.ravel(), return_index=True, return_inverse=True)
            order = corners.ravel()[first], mesh.uvs[uv_corners.ravel()[first]]
            self._meshes[name] = (corners, indices.reshape(corners.shape).astype(np.int32), *order)
        corners, indices, vertex, uv = self._meshes[name]
        a, b, c = (vertices[corners[:, i]] for i in range(3))
        across = np.cross(b - a, c - a)
        flat = corners.ravel(order="F")
        normals = np.stack(
            [np.bincount(flat, np.tile(across[:, k], 3), len(vertices)) for k in range(3)], 1
        )
        normals = normals / (np.linalg.norm(normals, axis=1, keepdims=True) + 1e-9)
        packed = np.hstack([vertices[vertex], normals[vertex], uv]).astype(np.float32)
        return _Part(packed, indices, image, kind, tint, gloss)

    def _aim(self, view: View, look: Look, eye: np.ndarray) -> None:
        """Set camera and lights; the shift that puts the eyes where the view wants them is solved
        for."""
        rotation = _rotation(view)
        focal = 1 / math.tan(math.radians(view.field / 2))
        centre = eye + np.array([0, -0.02, -0.55])  # the middle of the skull: heads turn about it
        distance = 2.75 / view.zoom * focal * 0.5
        x, y, z = rotation @ (eye - centre)
        depth = distance - z
        shift = np.array(view.eyes) * depth / focal - (x, y)
        look_at = np.eye(4)
        look_at[:3, :3] = rotation
        look_at[:3, 3] = -rotation @ centre + np.array([*shift, -distance])
        near, far = max(0.2, distance - 3), distance + 4
        project = np.array(
            [
                [focal, 0, 0, 0],
                [0, focal, 0, 0],
                [0, 0, (far + near) / (near - far), 2 * far * near / (near - far)],
                [0, 0, -1, 0],
            ]
        )
        program = self.program
        program["projection"].write((project @ look_at).T.astype(np.float32).tobytes())
        program["rotation"].write(rotation.T.astype(np.float32).tobytes())
        light = np.array(view.light) / np.linalg.norm(view.light)
        values = {
            "key_direction": tuple(light),
            "key": view.key,
            "fill": view.fill,
            "ambient": view.ambient,
            "camera": tuple(rotation @ centre + np.array([*-shift, distance])),
            "material": MATERIALS[look.material],
            "paint": look.paint,
            "jacket": float(look.jacket),
            "eye": tuple(eye),
        }
        for name, value in values.items():
            program[name].value = value

    def _draw_part(self, part: _Part) -> None:
        gl, program = self.gl, self.program
        vertices, indices = gl.buffer(part.vertices.tobytes()), gl.buffer(part.indices.tobytes())
        layout = [(vertices, "3f 3f 2f", "position", "normal", "uv")]
        array = gl.vertex_array(program, layout, indices)
        part.image.use(0)
        program["part"].value, program["gloss"].value = part.kind, part.gloss
        program["tint"].value = tuple(float(c) for c in part.tint)
        if part.kind == HAIR:  # solid strands first, then the soft fringe over what is behind
            program["alpha_range"].value = (0.55, 2.0, 0.0)
            array.render()
            gl.enable(gl.BLEND)
            gl.blend_func = gl.SRC_ALPHA, gl.ONE_MINUS_SRC_ALPHA, gl.ONE, gl.ONE_MINUS_SRC_ALPHA
            self.frame.depth_mask = False
            program["alpha_range"].value = (0.04, 0.55, 1.0)
            array.render()
            self.frame.depth_mask = True
            gl.disable(gl.BLEND)
        else:
            array.render()
        for thing in (array, vertices, indices):
            thing.release()

    def _upload(self, key: object, image: np.ndarray) -> None:
        if image.shape[2] == 3:
            image = np.dstack([image, np.full(image.shape[:2], 255, np.uint8)])
        pixels = np.ascontiguousarray(image[::-1]).tobytes()
        texture = self.gl.texture((image.shape[1], image.shape[0]), 4, pixels)
        texture.build_mipmaps()
        texture.filter = (self.gl.LINEAR_MIPMAP_LINEAR, self.gl.LINEAR)
        self._textures[key] = texture


def _clear_lenses(image: np.ndarray) -> np.ndarray:
    """Make lenses of dark glasses almost clear: eyes are much of who somebody is."""
    alpha = image[:, :, 3]
    return np.dstack([image[:, :, :3], np.where(alpha < 240, alpha // 6, alpha)])


def _rotation(view: View) -> np.ndarray:
    cy, sy = math.cos(view.yaw), math.sin(view.yaw)
    cp, sp = math.cos(view.pitch), math.sin(view.pitch)
    cr, sr = math.cos(view.roll), math.sin(view.roll)
    roll = np.array([[cr, -sr, 0], [sr, cr, 0], [0, 0, 1]])
    pitch = np.array([[1, 0, 0], [0, cp, -sp], [0, sp, cp]])
    yaw = np.array([[cy, 0, sy], [0, 1, 0], [-sy, 0, cy]])
    return roll @ pitch @ yaw


def _cartoon(vertices: np.ndarray, eyes: np.ndarray, strength: float) -> np.ndarray:
    """Warp space as an animated film does: larger eyes, smaller nose, narrower jaw, wider crown."""
    left, right = eyes[eyes[:, 0] > 0].mean(0), eyes[eyes[:, 0] < 0].mean(0)
    for centre in (left, right):
        offset = vertices - (centre - np.array([0, 0, 0.05]))
        near = np.exp(-(offset**2).sum(1) / 0.42**2)[:, None]
        vertices = vertices + offset * near * np.array([0.85, 1.0, 0.25]) * strength
    middle = (left + right) / 2
    offset = vertices - (middle + np.array([0, -0.42, 0.25]))
    near = np.exp(-(offset**2).sum(1) / 0.36**2)[:, None]
    vertices = vertices - offset * near * np.array([0.28, 0.22, 0.35]) * strength
    height = np.clip((vertices[:, 1] - (middle[1] - 0.2)) / 1.2, -1, 1)
    width = 1 - 0.10 * strength * np.clip(-height, 0, 1) + 0.08 * strength * np.clip(height, 0, 1)
    return vertices * np.stack([width, np.ones_like(width), np.ones_like(width)], 1)


def _lips(head: Head) -> np.ndarray:
    """Read the mask of the lips in skin coordinates, (512, 512) in 0..1."""
    mask = read_image(head.textures / "mpfb_lips.jpg", cv2.IMREAD_GRAYSCALE)
    return cv2.resize(mask, (512, 512), interpolation=cv2.INTER_AREA).astype(np.float32) / 255


def _beard_mask(head: Head, lips: np.ndarray) -> np.ndarray:
    mask = np.zeros((512, 512), np.float32)
    for quad in head.beard_quads():
        cv2.fillConvexPoly(mask, (quad * [511, -511] + [0, 511]).astype(np.int32), 1.0)
    bare = np.clip(cv2.GaussianBlur(lips, (0, 0), 1.0) * 1.4, 0, 1)
    return cv2.GaussianBlur(mask, (0, 0), 9) ** 1.5 * (1 - bare)


@functools.cache
def _read_image(path: Path) -> np.ndarray:
    image = read_image(path)
    code = cv2.COLOR_BGRA2RGBA if image.shape[2] == 4 else cv2.COLOR_BGR2RGB
    return cv2.cvtColor(image, code)


@functools.cache
def _skin_file(materials: Path, age: str, race: str, male: float) -> Path:
    sex = "male" if male > 0.5 else "female"
    files = sorted((materials / f"skins/{age}_{race}_{sex}/textures").glob("*.png"))
    return next(f for f in files if "suit" not in f.name)


@functools.cache
def _only(folder: Path) -> Path:
    (path,) = sorted(folder.glob("*.png"))
    return path
