"""Turn a photo file into an aligned face crop, refusing what is not a photo or shows no
usable face.

Detector: YuNet, from the OpenCV zoo (Wu et al., "YuNet: A Tiny Millisecond-level Face Detector",
2023). Coordinates are pixels from the picture's upper left corner, the centre of the first pixel
being (0.5, 0.5), so that they scale with the picture.
"""

from __future__ import annotations

import cmath
import functools
import math
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np

from hdbcli.faces.looks import SIDE, TEMPLATE, doubts_about
from hdbcli.faces.reading import GREY, read_photo
from registry.errors import HdbError

MIN_FACE = 48  # pixels of the shorter side: below it an eye is a handful of pixels
SMALL_FACE = 96  # pixels: below it fine detail is missing
FAR_LARGER = 2  # times as wide as the next: a person before a poster, not two people
ENLARGED = 1.25  # where the crop shows it larger than the photo by more than this
DETECTOR = Path(__file__).parent / "assets" / "face_detection_yunet_2023mar.onnx"

_SCORE = 0.7  # faces score 0.85 to 0.96, textures in photos without a face up to 0.74
# YuNet finds faces of about 10 to 300 px. At the first two sizes it finds those that fill the
# frame (pictures of 64 px, as a small base draws them, are enlarged), at the last the small ones.
_SIDES = (160, 320, 1024)
_MARGIN = 0.25  # of the longer side, in grey: faces that touch the frame are found more often
_TILTS = range(-60, 61, 15)  # degrees, see `_settled`
_PATCH = 160  # pixels
_ONE_LOOK = 160  # pixels of a crop that is looked at once
_SCORE_BAND = 0.06  # below the best score, what still has a say
_BLUR_SIDE = 96
_BLURRED = 0.02
_SURE = 0.92  # a score at which no face lies on its side
_SURER = 0.015  # by which a turned photo must score more
_TURNED = 0.5  # of the distance of the eyes, of the nose from their middle: some 40 degrees
_DARK = 24  # mean level of the crop
_LISTED = 8  # faces that one error names

Box = tuple[float, float, float, float]  # x, y, width, height


@dataclass(frozen=True, eq=False)
class Face:
    """A face in a picture: its box (x, y, width, height), five points and the detector's score.

    `landmarks` is (5, 2), x and y, in YuNet's order, which names sides as the person does: right
    eye, left eye, nose tip, right and left mouth corner. The eye on the picture's left is first.
    """

    box: Box
    landmarks: np.ndarray
    score: float

    @property
    def side(self) -> float:
        """Return the shorter side of the box in pixels, which all limits are about."""
        return min(self.box[2:])


@dataclass(frozen=True, eq=False)
class Crop:
    """The aligned face of a photo: number `index` of `count`, counted from the left, from 1."""

    image: np.ndarray  # (size, size, 3) uint8 RGB
    face: Face
    index: int
    count: int
    warnings: tuple[str, ...]


@functools.cache
def _detector() -> cv2.FaceDetectorYN:
    # OpenCV 5, which moved this setting, warns of its own defaults whenever it loads a network.
    log = getattr(cv2.utils, "logging", cv2)
    level = log.setLogLevel(2)  # errors only
    try:
        # As bytes, since OpenCV does not open every path on every system.
        weights = np.frombuffer(DETECTOR.read_bytes(), dtype=np.uint8)
        no_config = np.zeros(0, dtype=np.uint8)
        return cv2.FaceDetectorYN.create("onnx", weights, no_config, (320, 320), _SCORE)
    except (OSError, cv2.error) as error:
        raise HdbError(f"{DETECTOR.name}: {error}; reinstall hyperdreambooth") from None
    finally:
        log.setLogLevel(level)


def find_faces(rgb: np.ndarray) -> list[Face]:
    """Find the faces of an RGB picture (H, W, 3) uint8, largest first; none gives an empty list."""
    height, width = rgb.shape[:2]
    largest = min(max(height, width), _SIDES[-1])
    small, found = rgb, []
    for side in sorted({*_SIDES[:-1], max(largest, _SIDES[-2])}, reverse=True):
        small = _resized(small, side)  # each from the one before: a large photo is read once
        stretch = [width / small.shape[1], height / small.shape[0]]
        found += (_detect(small, round(_MARGIN * side)) * np.array([*stretch * 7, 1])).tolist()
    kept: list[Face] = []
    for x, y, w, h, *points, score in sorted(found, key=lambda row: -row[14]):
        face = Face((x, y, w, h), np.reshape(points, (5, 2)), score)
        if all(_overlap(face.box, other.box) < 0.5 for other in kept):
            kept.append(face)
    return sorted((_settled(rgb, face) for face in kept), key=lambda face: -face.side)


def find_points(rgb: np.ndarray) -> np.ndarray | None:
    """Find the five points (5, 2) of the largest face of a crop (H, W, 3) uint8, or None, in one
    look: a thirtieth of the time of `find_faces`, for faces that are upright and large in it."""
    small = _resized(rgb, _ONE_LOOK)
    rows = _detect(small, round(_MARGIN * _ONE_LOOK))
    if not len(rows):
        return None
    points = rows[(rows[:, 2] * rows[:, 3]).argmax(), 4:14].reshape(5, 2)
    return points * (rgb.shape[1] / small.shape[1])


def _resized(rgb: np.ndarray, side: int) -> np.ndarray:
    """Scale a picture so that its longer side is `side`."""
    scale = side / max(rgb.shape[:2])
    shape = max(1, round(rgb.shape[1] * scale)), max(1, round(rgb.shape[0] * scale))
    return cv2.resize(rgb, shape, interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC)


def _detect(rgb: np.ndarray, m: int) -> np.ndarray:
    """Run YuNet on the picture with a grey margin of `m` pixels around it.

    Return (N, 15) rows in the picture's pixels: x, y, width, height, x and y of five points, score.
    """
    padded = cv2.copyMakeBorder(rgb, m, m, m, m, cv2.BORDER_CONSTANT, value=GREY)
    detector = _detector()
    detector.setInputSize((padded.shape[1], padded.shape[0]))
    rows = detector.detect(cv2.cvtColor(padded, cv2.COLOR_RGB2BGR))[1]
    if rows is None:
        return np.zeros((0, 15))
    return np.asarray(rows, dtype=np.float64) - np.array([m, m, 0, 0, *[m] * 10, 0])


def _settled(rgb: np.ndarray, face: Face) -> Face:
    """Return the face with points that follow its tilt.

    YuNet draws the points of a tilted head nearly upright, 20 degrees off at 35, but its score
    knows better: look at the face turned by several angles and average what the best say. On the
    astronaut and 12 renders this leaves 1 to 2 degrees, and a quarter of the error of the points.
    """
    x, y, w, h = face.box
    middle = complex(_PATCH, _PATCH) / 2
    scale = _PATCH / (1.6 * max(w, h))  # the first cut is larger, for its corners to turn into view
    first = scale, 2 * middle - scale * complex(x + w / 2, y + h / 2)
    cut = _mapped(rgb, *first, 2 * _PATCH)
    seen = []
    for tilt in _TILTS:
        turn = cmath.rect(1.6 / 2.2, math.radians(tilt))
        second = turn, middle - turn * 2 * middle
        rows = _detect(_mapped(cut, *second, _PATCH), 0)
        centre = rows[:, 0] + rows[:, 2] / 2 + 1j * (rows[:, 1] + rows[:, 3] / 2)
        rows = rows[abs(centre - middle) < _PATCH / 4]  # not the neighbour
        if len(rows):
            best = rows[rows[:, 14].argmax()]
            points = ((best[4:14:2] + 1j * best[5:14:2] - second[1]) / turn - first[1]) / scale
            seen.append((best[14], points))
    if not seen:
        return face
    scores = np.array([score for score, _ in seen])
    weights = np.clip(scores - scores.max() + _SCORE_BAND, 0, None)
    mean = weights @ np.stack([points for _, points in seen]) / weights.sum()
    return Face(face.box, np.stack([mean.real, mean.imag], axis=1), face.score)


def _overlap(a: Box, b: Box) -> float:
    """Return how much of the smaller box both share: a part of a face taken for one shares all."""
    wide = min(a[0] + a[2], b[0] + b[2]) - max(a[0], b[0])
    high = min(a[1] + a[3], b[1] + b[3]) - max(a[1], b[1])
    return max(wide, 0.0) * max(high, 0.0) / max(min(a[2] * a[3], b[2] * b[3]), 1e-9)


def align(rgb: np.ndarray, landmarks: np.ndarray, template: np.ndarray, size: int) -> np.ndarray:
    """Return the (size, size, 3) uint8 picture in which `landmarks` lie closest to `template`.

    `template` is (5, 2) in the unit square. The map is the least-squares similarity: it turns,
    scales and shifts, and never mirrors. What lies outside the photo repeats its border.
    """
    return _mapped(rgb, *similarity(landmarks, template * size), size)


def _mapped(rgb: np.ndarray, turn: complex, shift: complex, size: int) -> np.ndarray:
    """Draw the (size, size) picture in which the photo's point z = x + iy is at turn * z + shift.

    A map that shrinks is drawn `fold` times too large and averaged, so that every pixel of the
    photo counts, as in the supersampled renders that a base may have learned from.
    """
    fold = max(1, math.ceil(1 / abs(turn)))
    # Only the part of the photo that is seen: OpenCV maps nothing from sides over 32,767 px.
    corners = (np.array([0, size, size * 1j, size + size * 1j]) - shift) / turn
    top, left = _inside(corners.imag, rgb.shape[0]), _inside(corners.real, rgb.shape[1])
    turn, shift = turn * fold, (shift + turn * complex(left.start, top.start)) * fold
    half = 0.5 + 0.5j  # OpenCV counts from the centre of the first pixel
    shift += turn * half - half
    matrix = np.array([[turn.real, -turn.imag, shift.real], [turn.imag, turn.real, shift.imag]])
    part, large = np.ascontiguousarray(rgb[top, left]), (size * fold, size * fold)
    drawn = cv2.warpAffine(part, matrix, large, None, cv2.INTER_CUBIC, cv2.BORDER_REPLICATE)
    return cv2.resize(drawn, (size, size), interpolation=cv2.INTER_AREA)


def similarity(points: np.ndarray, goals: np.ndarray) -> tuple[complex, complex]:
    """Fit goal = turn * point + shift, with x and y as one complex number."""
    z, w = (xy[:, 0] + 1j * xy[:, 1] for xy in (points, goals))
    spread = z - z.mean()
    size = float((abs(spread) ** 2).sum())
    turn = complex((spread.conj() * (w - w.mean())).sum()) / size if size else 0
    if not turn:
        raise HdbError("the five points of the face do not show its position; take another photo")
    return turn, complex(w.mean()) - turn * complex(z.mean())


def _inside(span: np.ndarray, length: int, border: int = 3) -> slice:
    """Return the pixels under `span` and `border` more, as far as the picture has them."""
    start = min(max(math.floor(span.min()) - border, 0), length - 1)
    return slice(start, min(max(math.ceil(span.max()) + border, start + 1), length))


def crop_face(
    path: Path, template: np.ndarray, size: int, face: int | None = None, several: bool = False
) -> Crop:
    """Read a photo and return its face, aligned to `template` (see `align`), `size` pixels square.

    Where no face is found, the photo is turned by quarters until one is. `face`, from 1 at the
    left, picks one, and must where there are several, unless one is FAR_LARGER times the next; of
    `several` photos it picks in those alone. What was done and what is doubtful is in the crop's
    warnings. Raise HdbError if none is there, or picked, or is MIN_FACE pixels wide.
    """
    doubts: list[str] = []
    rgb = read_photo(path, doubts.append)
    rgb, found = _upright(rgb, doubts)
    faces = sorted(found, key=lambda face: face.box[0] + face.box[2] / 2)
    count = len(faces)
    index = 1 if face is None or (several and count == 1) else face
    if face is None and count > 1 and found[0].side >= FAR_LARGER * found[1].side:
        face = index = faces.index(found[0]) + 1
        doubts.append(
            f"{path} shows {count} faces; took number {index}, which is far larger than the "
            f"others; --face N picks another: {_listed(faces, rgb)}"
        )
    if not faces:
        raise HdbError(
            f"{path}: no face found; use a photo with one face seen from the front, in good light, "
            "or crop it closer to the face"
        )
    if (face is None and count > 1) or not 1 <= index <= count:
        shows = f"{count} face{'s' * (count > 1)}" + (f", not {face}" if face is not None else "")
        raise HdbError(f"{path} shows {shows}; pick with --face N: {_listed(faces, rgb)}")
    chosen = faces[index - 1]
    if chosen.side < MIN_FACE:
        raise HdbError(
            f"{path}: the face is {chosen.side:.0f} px wide, at least {MIN_FACE} are needed; "
            "use a larger photo or one taken from closer"
        )
    turn, shift = similarity(chosen.landmarks, template * size)
    if chosen.side < SMALL_FACE and abs(turn) > ENLARGED:
        doubts.append(f"the face is only {chosen.side:.0f} px wide: expect less likeness")
    if _sharpness(rgb, chosen.box) < _BLURRED:
        doubts.append("the face is very blurred: expect less likeness, try a sharper photo")
    turned = _nose_offset(chosen.landmarks) > _TURNED
    if turned:
        doubts.append(
            "the face is turned far to the side: expect less likeness, try a photo from the front"
        )
    image = _mapped(rgb, turn, shift, size)
    if image.mean() < _DARK:
        doubts.append(
            "the face is very dark: expect less likeness and dark portraits, try a photo in better "
            "light"
        )
    elif not turned:  # what is looked at lies where it should
        doubts += doubts_about(align(rgb, chosen.landmarks, TEMPLATE, SIDE))
    return Crop(image, chosen, index, count, tuple(doubts))


def _nose_offset(landmarks: np.ndarray) -> float:
    """Return how far the nose lies from the middle of the eyes along their line, over their
    distance: 0 from the front, 0.05 in the median photo, above 0.44 in one of a hundred."""
    right, left, nose = landmarks[:3]
    across = left - right
    offset = (nose - (right + left) / 2) @ across
    return abs(float(offset)) / max(float(across @ across), 1e-9)


def _upright(rgb: np.ndarray, doubts: list[str]) -> tuple[np.ndarray, list[Face]]:
    """Return the photo as it stands upright and its faces, largest first, if there are any.

    Scans and some messengers drop the EXIF orientation. YuNet finds lying faces too, with points
    that are wrong, but is less sure of them: of 57 people's photos, upright 0.911 to 0.96, lying at
    most 0.917, and always less than the same photo upright, by 0.025 at least.
    """
    faces = find_faces(rgb)
    best = max((face.score for face in faces), default=0.0)
    if best >= _SURE:
        return rgb, faces
    best += _SURER
    upright, quarters = rgb, 0
    for turn in (1, 2, 3):
        turned = np.ascontiguousarray(np.rot90(rgb, turn))
        found = find_faces(turned)
        if (score := max((face.score for face in found), default=0.0)) > best:
            best, upright, quarters, faces = score, turned, turn, found
    if quarters:
        lay = ("", "on its right side", "upside down", "on its left side")[quarters]
        doubts.append(f"the photo lies {lay}: it was turned to find the face")
    return upright, faces


def _listed(faces: list[Face], rgb: np.ndarray) -> str:
    """Say where the faces are: `1: left, 212 px; 2: bottom right, 40 px, too small`."""
    texts = []
    for number, face in enumerate(faces[:_LISTED], 1):
        x, y, w, h = face.box
        middle = (x + w / 2) / rgb.shape[1], (y + h / 2) / rgb.shape[0]
        across, down = np.clip(np.floor(3 * np.array(middle)), 0, 2).astype(int)
        place = ("top ", "", "bottom ")[down] + ("left", "centre", "right")[across]
        small = ", too small" if face.side < MIN_FACE else ""
        texts.append(f"{number}: {place}, {face.side:.0f} px{small}")
    return "; ".join(texts + ["and so on"] * (len(faces) > _LISTED))


def _sharpness(rgb: np.ndarray, box: Box) -> float:
    """Return the variance of the Laplacian over that of the grey levels, at a fixed face size.

    Divided, since a dark or softly lit face is not a blurred one. Measured on a 90 px portrait: as
    it is 0.19, enlarged from 36 px 0.04, with Gaussian blur of 1.5 px 0.019, of 2 px 0.012.
    """
    x, y, w, h = box
    rows = _inside(np.array([y, y + h]), rgb.shape[0], 0)
    columns = _inside(np.array([x, x + w]), rgb.shape[1], 0)
    small = cv2.resize(rgb[rows, columns], (_BLUR_SIDE, _BLUR_SIDE), interpolation=cv2.INTER_AREA)
    grey = cv2.cvtColor(small, cv2.COLOR_RGB2GRAY).astype(np.float32)
    return float(cv2.Laplacian(grey, cv2.CV_32F).var()) / max(float(grey.var()), 1e-9)
