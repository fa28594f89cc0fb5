"""Read a photograph for the painters: an aligned wide crop, and what in it is face, hair, clothes.

Two small networks of MediaPipe (Apache-2.0, from npm) are run with LiteRT: selfie segmentation
says what is the person, the face mesh says where 468 points of the face lie, in depth too. The rest
follows from them: surface directions, the openings of the eyes and the mouth, hair and clothes.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, replace
from pathlib import Path

import cv2
import numpy as np

from hdbcli.faces.photo import align
from registry.errors import HdbError
from registry.fetch import fetch
from registry.tiny import TEMPLATE
from registry.tiny.recipe.assets import FACE_MESH, SELFIE

SIDE = 280  # pixels of the wide crop
CANVAS = 160  # pixels of the pictures that are painted on, at the same scale
FIELD = 1.75  # its side, in sides of the crop that `tiny` draws
MIDDLE = np.array([0.5, 0.575])  # its middle in that crop: lower, for shoulders to stand further

# Points of the face mesh, around each part in order; "right" is the person's.
OVAL = (
    "10 338 297 332 284 251 389 356 454 323 361 288 397 365 379 378 400 377 152 148 176 149 150 "
    "136 172 58 132 93 234 127 162 21 54 103 67 109"
)
RIGHT_EYE = "33 7 163 144 145 153 154 155 133 173 157 158 159 160 161 246"
LEFT_EYE = "263 249 390 373 374 380 381 382 362 398 384 385 386 387 388 466"
RIGHT_BROW = "70 63 105 66 107 55 65 52 53 46"
LEFT_BROW = "300 293 334 296 336 285 295 282 283 276"
LIPS = "61 146 91 181 84 17 314 405 321 375 291 409 270 269 267 0 37 39 40 185"
MOUTH = "78 95 88 178 87 14 317 402 318 324 308 415 310 311 312 13 82 81 80 191"
PARTS = {
    name: np.array(points.split(), dtype=int)
    for name, points in {
        "oval": OVAL,
        "right_eye": RIGHT_EYE,
        "left_eye": LEFT_EYE,
        "right_brow": RIGHT_BROW,
        "left_brow": LEFT_BROW,
        "lips": LIPS,
        "mouth": MOUTH,
    }.items()
}
CHIN, FOREHEAD, RIGHT_CHEEK, LEFT_CHEEK, NOSE = 152, 10, 234, 454, 4

_LANDMARKS = slice(2495952, 3737848)  # of the packed file: face_landmark.tflite
_TOPOLOGY = slice(3737848, 3757224)  # and the mesh's triangles, as a protocol buffer
_MESH_SIDE, _PERSON_SIDE = 192, 256


@dataclass(frozen=True, eq=False)
class Subject:
    """What the painters know of one photograph, all in the pixels of one square picture.

    `rgb` (S, S, 3) float32 0..255. `layers` (S, S, 7) float32: person, skin, hair and clothes from
    0 to 1, and the surface's direction x, y, z (right, down, to the viewer; length 1). `mesh`
    (468, 2) and `points` (5, 2), the detector's, are x and y in pixels.
    """

    rgb: np.ndarray
    layers: np.ndarray
    mesh: np.ndarray
    points: np.ndarray

    @property
    def person(self) -> np.ndarray:
        return self.layers[:, :, 0]

    @property
    def skin(self) -> np.ndarray:
        return self.layers[:, :, 1]

    @property
    def hair(self) -> np.ndarray:
        return self.layers[:, :, 2]

    @property
    def clothes(self) -> np.ndarray:
        return self.layers[:, :, 3]

    @property
    def normals(self) -> np.ndarray:
        return self.layers[:, :, 4:7]

    @functools.cached_property
    def close(self) -> Subject:
        """See the face as a portrait does, where the template has it."""
        return self.seen(camera(), CANVAS)

    @functools.cached_property
    def drawing(self) -> np.ndarray:
        """Return the photograph's drawing (S, S), about -1..1: log brightness without its slow
        changes, as strong in every face, so that a dark or flatly lit one is carved as deep."""
        light = np.log(grey_of(self.rgb) + 0.04)
        weight = self.person + 0.02
        # Slow changes of the person alone: the wall behind must not draw an edge.
        slow = blur(light * weight, 0.1) / blur(weight, 0.1)
        fine = (light - slow) * self.person
        face = self.part("oval") > 0.5
        spread = float(fine[face].std()) if face.any() else 0.3
        return fine * (0.25 / max(spread, 0.08)) ** 0.75

    @functools.cached_property
    def shade(self) -> np.ndarray:
        """Return the photograph's own slow light on the person, 1 on average."""
        grey = grey_of(self.rgb)
        weight = self.skin + 0.05
        slow = blur(grey * weight, 0.07) / blur(weight, 0.07)
        return slow / max(float(slow[self.part("oval") > 0.5].mean()), 0.05)

    def part(self, name: str, soft: float = 0.0) -> np.ndarray:
        """Return the mask (S, S) of a part of the face, with an edge `soft` pixels wide."""
        return polygon(self.mesh[PARTS[name]], len(self.rgb), soft)

    def seen(self, matrix: np.ndarray, side: int) -> Subject:
        """Draw everything through a 2 x 3 similarity of pixels into a picture `side` wide."""

        def drawn(image: np.ndarray) -> np.ndarray:
            return cv2.warpAffine(
                image, matrix, (side, side), None, cv2.INTER_LINEAR, cv2.BORDER_REFLECT_101
            )

        # OpenCV warps up to four channels at a time.
        layers = np.dstack([drawn(self.layers[:, :, :4]), drawn(self.layers[:, :, 4:])])
        return replace(
            self,
            rgb=drawn(self.rgb),
            layers=layers,
            mesh=moved(self.mesh, matrix),
            points=moved(self.points, matrix),
        )


def camera(
    zoom: float = 1.0, roll: float = 0.0, shift: tuple[float, float] = (0.0, 0.0)
) -> np.ndarray:
    """Return the 2 x 3 map from the wide crop's pixels to the canvas'.

    `zoom` 1 is the crop that `tiny` draws; smaller stands further back. `roll` is in radians,
    `shift` in sides of the canvas.
    """
    scale = zoom * FIELD * CANVAS / SIDE
    cos, sin = scale * math.cos(roll), scale * math.sin(roll)
    # The middle of the face, between eyes and nose, stays where it is.
    pivot = np.array([0.5, 0.5])
    source = ((pivot - MIDDLE) / FIELD + 0.5) * SIDE
    goal = (pivot + shift) * CANVAS
    turn = np.array([[cos, -sin], [sin, cos]])
    return np.column_stack([turn, goal - turn @ source])


def blur(image: np.ndarray, share: float) -> np.ndarray:
    """Blur by a share of the picture's side; wide blurs are made on a small copy."""
    sigma = share * len(image)
    if sigma < 6:
        return cv2.GaussianBlur(image, (0, 0), sigma)
    small = cv2.resize(image, None, fx=0.25, fy=0.25, interpolation=cv2.INTER_AREA)
    small = cv2.GaussianBlur(small, (0, 0), sigma / 4, borderType=cv2.BORDER_REPLICATE)
    return cv2.resize(small, image.shape[1::-1], interpolation=cv2.INTER_LINEAR)


def grey_of(rgb: np.ndarray) -> np.ndarray:
    return np.asarray(rgb, np.float32) @ np.array([0.299, 0.587, 0.114], np.float32) / 255


def moved(points: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    """Map (N, 2) points by a 2 x 3 matrix."""
    return points @ matrix[:, :2].T + matrix[:, 2]


def polygon(points: np.ndarray, side: int, soft: float = 0.0) -> np.ndarray:
    """Draw a filled polygon as a mask (side, side) float32 of 0..1, blurred by `soft` pixels."""
    mask = np.zeros((side, side), np.float32)
    fine = np.round(np.asarray(points) * 16).astype(np.int32)
    cv2.fillPoly(mask, [fine], 1.0, cv2.LINE_AA if mask.dtype == np.uint8 else cv2.LINE_8, 4)
    return cv2.GaussianBlur(mask, (0, 0), soft) if soft else mask


def wide_template() -> np.ndarray:
    """Return where the detector's five points lie in the wide crop, (5, 2) in the unit square."""
    return (np.array(TEMPLATE) - MIDDLE) / FIELD + 0.5


def wide_crop(photo: np.ndarray, landmarks: np.ndarray) -> np.ndarray:
    """Align a photo's face in the wide crop (SIDE, SIDE, 3) uint8. Outside the photo its mirror
    image keeps walls and hair going; below, where that would be a second chin, its last row."""
    span = float(np.linalg.norm(landmarks[1] - landmarks[0]))
    edge = min(math.ceil(5 * span), *(side - 1 for side in photo.shape[:2]))
    longer = cv2.copyMakeBorder(photo, 0, edge, 0, 0, cv2.BORDER_REPLICATE)
    mirrored = cv2.copyMakeBorder(longer, edge, 0, edge, edge, cv2.BORDER_REFLECT_101)
    return align(mirrored, landmarks + edge, wide_template(), SIDE)


class Reader:
    """Reads wide crops; holds the two networks."""

    def __init__(self, assets: Path) -> None:
        """Fetch the networks into `assets`, once. Raise HdbError if that or LiteRT fails."""
        packed = (fetch(FACE_MESH, assets) / "face_mesh_solution_packed_assets.data").read_bytes()
        person = (fetch(SELFIE, assets) / "selfie_segmentation.tflite").read_bytes()
        self._mesh = _Network(packed[_LANDMARKS])
        self._person = _Network(person)
        self.triangles = _triangles(packed[_TOPOLOGY])

    def read(self, wide: np.ndarray) -> Subject | None:
        """Read a wide crop (SIDE, SIDE, 3) uint8; None where the mesh finds no face in it."""
        found = self._find_mesh(wide)
        if found is None:
            return None
        guide = wide.astype(np.float32)
        small = cv2.resize(guide, (_PERSON_SIDE, _PERSON_SIDE), interpolation=cv2.INTER_AREA)
        person = cv2.resize(self._person(small / 255)[0].reshape(_PERSON_SIDE, -1), (SIDE, SIDE))
        grey = cv2.cvtColor(wide, cv2.COLOR_RGB2GRAY).astype(np.float32) / 255
        person = np.clip(guided(grey, person, 6, 1e-3) * 1.2 - 0.1, 0, 1)
        oval = polygon(found[PARTS["oval"], :2], SIDE, 2.0)
        person = np.maximum(person, oval)
        masks = _masks(guide, person, found)
        normals = _normals(found, self.triangles, person, oval)
        layers = np.dstack([*masks, normals]).astype(np.float32)
        return Subject(guide, layers, found[:, :2], wide_template() * SIDE)

    def _find_mesh(self, wide: np.ndarray) -> np.ndarray | None:
        """Return the mesh (468, 3) in pixels of the wide crop, looked for twice: the second look is
        centred on what the first found."""
        eyes = wide_template()[:2].mean(axis=0) * SIDE
        centre, side = eyes + np.array([0, 0.08 * SIDE]), 0.74 * SIDE
        points, score = np.zeros((468, 3)), 0.0
        for _ in range(2):
            scale = _MESH_SIDE / side
            matrix = np.array(
                [
                    [scale, 0, -scale * (centre[0] - side / 2)],
                    [0, scale, -scale * (centre[1] - side / 2)],
                ]
            )
            cut = cv2.warpAffine(
                wide, matrix, (_MESH_SIDE, _MESH_SIDE), None, cv2.INTER_AREA, cv2.BORDER_REFLECT_101
            )
            raw, flag = self._mesh(cut.astype(np.float32) / 255)
            score = float(1 / (1 + np.exp(-flag.ravel()[0])))
            points = raw.reshape(468, 3) / scale
            points[:, :2] += centre - side / 2
            low, high = points[:, :2].min(axis=0), points[:, :2].max(axis=0)
            centre, side = (low + high) / 2, 1.5 * float((high - low).max())
        away = np.abs(points[PARTS["right_eye"], :2].mean(axis=0) - wide_template()[0] * SIDE).max()
        return points if score > 0.5 and away < 0.06 * SIDE else None


class _Network:
    """A TensorFlow Lite network of one picture, run on one thread."""

    def __init__(self, content: bytes) -> None:
        try:
            from ai_edge_litert.interpreter import Interpreter
        except ImportError:
            raise HdbError("painting needs LiteRT: pip install ai-edge-litert") from None
        self._interpreter = Interpreter(model_content=content, num_threads=1)
        self._interpreter.allocate_tensors()
        self._input = self._interpreter.get_input_details()[0]["index"]
        self._outputs = [o["index"] for o in self._interpreter.get_output_details()]

    def __call__(self, picture: np.ndarray) -> list[np.ndarray]:
        self._interpreter.set_tensor(self._input, picture[None])
        self._interpreter.invoke()
        return [self._interpreter.get_tensor(index) for index in self._outputs]


def guided(guide: np.ndarray, image: np.ndarray, radius: int, noise: float) -> np.ndarray:
    """Smooth `image` (S, S[, C]) along the edges of the grey `guide` (S, S), both float32 0..1.

    The guided filter (He, Sun and Tang, 2010): in every window the image is taken for a linear
    function of the guide; edges of variance over `noise` stay.
    """
    box = functools.partial(
        cv2.blur, ksize=(2 * radius + 1,) * 2, borderType=cv2.BORDER_REFLECT_101
    )
    spread = box(guide * guide) - box(guide) ** 2 + noise
    if image.ndim == 3:  # every channel in one pass
        guide, spread = guide[:, :, None], spread[:, :, None]
    mean, level = box(guide), box(image)
    if image.ndim == 3:
        mean = mean[:, :, None]
    slope = (box(guide * image) - mean * level) / spread
    return box(slope) * guide + box(level - slope * mean)


def _masks(rgb: np.ndarray, person: np.ndarray, mesh: np.ndarray) -> list[np.ndarray]:
    """Return person, skin, hair and clothes, each (S, S): by place first, by colour where place
    does not tell (ears and temples, a fringe, long hair beside the neck)."""
    xy = mesh[:, :2]
    side = len(rgb)
    wide = float(np.linalg.norm(xy[RIGHT_CHEEK] - xy[LEFT_CHEEK]))
    chin = xy[CHIN]
    lab = cv2.cvtColor((rgb / 255).astype(np.float32), cv2.COLOR_RGB2LAB)
    lab = cv2.GaussianBlur(lab, (0, 0), 1.0)
    cheeks = polygon(xy[PARTS["oval"]], side) > 0.5
    for name in ("right_eye", "left_eye", "right_brow", "left_brow", "lips"):
        cheeks &= polygon(xy[PARTS[name]], side, 2.0) < 0.1
    y, x = np.mgrid[0:side, 0:side].astype(np.float32)
    brows = xy[PARTS["right_brow"], 1].mean() / 2 + xy[PARTS["left_brow"], 1].mean() / 2
    core = cheeks & (y > brows) & (np.abs(x - chin[0]) < 0.36 * wide)
    like_skin = _likeness(lab, lab[core] if core.sum() > 50 else lab[cheeks])
    # Over the brows dark hair and dark skin differ in lightness alone: compare it sharply.
    like_bald = _likeness(lab, lab[cheeks & (y > brows - 0.12 * wide)], 0.55)
    inside = person > 0.6
    outside_oval = polygon(xy[PARTS["oval"]], side, 1.0) < 0.3
    crown = inside & outside_oval & (y < brows) & (like_bald < 0.5)
    chest = inside & (y > chin[1] + 0.45 * wide) & (like_skin < 0.5)
    chest &= np.abs(x - chin[0]) < 0.9 * wide
    like_hair = _likeness(lab, lab[crown]) if crown.sum() > 80 else np.zeros_like(person)
    like_cloth = _likeness(lab, lab[chest]) if chest.sum() > 80 else np.full_like(person, 0.1)
    oval = polygon(xy[PARTS["oval"]], side, 1.5)
    fringe = np.clip((brows - 0.03 * wide - y) / (0.06 * wide), 0, 1)
    above = np.clip((chin[1] - 0.35 * wide - y) / (0.12 * wide) + 0.5, 0, 1)  # no clothes here
    far = np.clip((np.abs(x - chin[0]) - 0.3 * wide) / (0.1 * wide), 0, 1)  # 0: neck, not hair
    fits_hair = like_hair / (like_hair + like_bald + like_skin + 1e-3)
    # A shining forehead is not hair, though it is not the skin's colour: go by lightness too.
    if crown.sum() > 80:
        bare, strand = (float(np.median(lab[some][:, 0])) for some in (core | cheeks, crown))
        towards = (lab[:, :, 0] - bare) / (strand - bare if abs(strand - bare) > 8 else np.inf)
        fits_hair = fits_hair * np.clip(4 * towards - 1, 0, 1)
    skin_face = oval * (1 - fringe * np.clip(2.5 * fits_hair - 0.75, 0, 1))
    near = np.clip(1.6 - np.abs(x - chin[0]) / (0.5 * wide), 0, 1)
    skin_else = (1 - oval) * near * (like_skin * (1 - fringe) + like_bald * fringe)
    skin = np.clip(skin_face + skin_else, 0, 1)
    rest = np.clip(1 - skin, 0, 1)
    down = like_hair / (like_hair + like_cloth + 1e-3) * far * (like_hair > 0.1)
    low = np.clip((y - chin[1] - 0.2 * wide) / (0.2 * wide), 0, 1)
    hair = rest * np.clip(above + (1 - above) * down * (1 - 0.3 * low), 0, 1)
    soft = [cv2.GaussianBlur(m.astype(np.float32), (0, 0), 1.2) * person for m in (skin, hair)]
    clothes = np.clip(person - soft[0] - soft[1], 0, 1)
    return [person, *soft, clothes]


def _likeness(lab: np.ndarray, sample: np.ndarray, lenience: float = 1.0) -> np.ndarray:
    """Say how well colours (S, S, 3) fit a sample (N, 3) of CIE Lab, 0 to 1: chroma counts more
    than lightness, which shadows change."""
    middle = np.median(sample, axis=0)
    spread = np.median(np.abs(sample - middle), axis=0) * 1.5 + np.array([9.0, 3.5, 3.5])
    away = (((lab - middle) / (2.0 * lenience * spread)) ** 2).sum(axis=2)
    return np.exp(-0.7 * away).astype(np.float32)


def _normals(
    mesh: np.ndarray, triangles: np.ndarray, person: np.ndarray, oval: np.ndarray
) -> np.ndarray:
    """Return the surface's directions (S, S, 3): the mesh's on the face, around it those of a
    pillow over the person's outline."""
    side = len(person)
    corners = mesh[triangles]
    faces = np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
    faces *= np.where(faces[:, 2:] > 0, -1, 1)  # MediaPipe's z grows away from the viewer
    faces[:, 2] *= -1
    faces /= np.linalg.norm(faces, axis=1, keepdims=True) + 1e-9
    drawn = np.zeros((side, side, 3), np.float32)
    flat = np.round(corners[:, :, :2] * 16).astype(np.int32)
    for index in np.argsort(-corners[:, :, 2].mean(axis=1)):
        a, b, c = (float(v) for v in faces[index])
        cv2.fillConvexPoly(drawn, flat[index], (a, b, c), cv2.LINE_8, 4)
    weight = (np.abs(drawn).sum(axis=2) > 0).astype(np.float32)
    smooth = cv2.GaussianBlur(drawn, (0, 0), 3.5)
    weight = cv2.GaussianBlur(weight, (0, 0), 3.5)[:, :, None]
    smooth = smooth / (weight + 1e-3)
    # The pillow: a quarter of a circle rises from the outline over a fifth of the picture.
    filled = cv2.copyMakeBorder(
        (person > 0.5).astype(np.uint8), 1, side // 5, 1, 1, cv2.BORDER_REPLICATE
    )
    away = cv2.distanceTransform(filled, cv2.DIST_L2, 5)[1 : side + 1, 1 : side + 1]
    reach = 0.2 * side
    height = reach * np.sqrt(1 - (1 - np.minimum(away / reach, 1)) ** 2)
    height = cv2.GaussianBlur(height.astype(np.float32), (0, 0), 5)
    pillow = np.dstack(
        [
            -cv2.Sobel(height, cv2.CV_32F, 1, 0, scale=1 / 8),
            -cv2.Sobel(height, cv2.CV_32F, 0, 1, scale=1 / 8),
            np.full_like(height, 1.0),
        ]
    )
    share = cv2.GaussianBlur(cv2.erode(oval, np.ones((9, 9))), (0, 0), 5)[:, :, None]
    normals = smooth * share + pillow * (1 - share)
    normals /= np.linalg.norm(normals, axis=2, keepdims=True) + 1e-9
    return normals


def _triangles(message: bytes) -> np.ndarray:
    """Read the mesh's triangles (T, 3) out of MediaPipe's geometry file: field 4, numbers of
    variable length, of the message in field 1."""
    numbers: list[int] = []
    at = 1 + len(_varint(message, 1)[1])
    end = at + _varint(message, 1)[0]
    while at < end:
        key, used = _varint(message, at)
        at += len(used)
        if key & 7 == 5:
            at += 4
            continue
        value, used = _varint(message, at)
        at += len(used)
        if key >> 3 == 4:
            numbers.append(value)
    return np.array(numbers).reshape(-1, 3)


def _varint(data: bytes, at: int) -> tuple[int, bytes]:
    """Read a number of seven bits a byte; return it and its bytes."""
    end = at
    while data[end] & 128:
        end += 1
    used = data[at : end + 1]
    return sum((byte & 127) << (7 * place) for place, byte in enumerate(used)), used
