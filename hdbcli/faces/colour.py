"""Bring the colours of pictures to sRGB.

Two ways: an ICC profile, through littleCMS with relative colorimetric intent; and an encoding in
numbers (primaries and a transfer function), as PNG, AVIF and HEIF name them by ITU-T H.273 or by
chunks of their own, computed here in float32 so that 16 bits keep their worth.
"""

from __future__ import annotations

import functools
import io
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageCms

Transfer = Callable[[np.ndarray], np.ndarray]

# x and y of red, green, blue and white.
D65 = (0.3127, 0.3290)
SRGB = (0.64, 0.33, 0.30, 0.60, 0.15, 0.06, *D65)
DISPLAY_P3 = (0.680, 0.320, 0.265, 0.690, 0.150, 0.060, *D65)
ADOBE_RGB = (0.64, 0.33, 0.21, 0.71, 0.15, 0.06, *D65)
_ILLUMINANT_C = (0.310, 0.316)
_SMPTE_170M = (0.630, 0.340, 0.310, 0.595, 0.155, 0.070, *D65)
PRIMARIES = {  # H.273, table 2
    1: SRGB,
    4: (0.67, 0.33, 0.21, 0.71, 0.14, 0.08, *_ILLUMINANT_C),
    5: (0.64, 0.33, 0.29, 0.60, 0.15, 0.06, *D65),
    6: _SMPTE_170M,
    7: _SMPTE_170M,
    8: (0.681, 0.319, 0.243, 0.692, 0.145, 0.049, *_ILLUMINANT_C),
    9: (0.708, 0.292, 0.170, 0.797, 0.131, 0.046, *D65),
    10: (1.0, 0.0, 0.0, 1.0, 0.0, 0.0, 1 / 3, 1 / 3),
    11: (0.680, 0.320, 0.265, 0.690, 0.150, 0.060, 0.314, 0.351),
    12: DISPLAY_P3,
    22: (0.630, 0.340, 0.295, 0.605, 0.155, 0.077, *D65),
}
UNSPECIFIED = 2  # of H.273, in both tables
SRGB_TRANSFER = 13
_WHITE_NITS = 203  # of diffuse white in HDR pictures: ITU-R BT.2408
_BRADFORD = np.array(
    [[0.8951, 0.2664, -0.1614], [-0.7502, 1.7135, 0.0367], [0.0389, -0.0685, 1.0296]]
)
_MODES = {"RGB": "RGB", "GRAY": "L", "CMYK": "CMYK", "Lab": "LAB"}  # ICC's name, Pillow's
_STRIP = 2**20  # pixels at a time
_SAME = 1  # levels: a profile that moves no colour by more is sRGB itself


def power(exponent: float) -> Transfer:
    """Return the transfer function of a plain gamma."""
    return lambda v: v**exponent


def srgb_to_linear(v: np.ndarray) -> np.ndarray:
    """Decode sRGB's curve (IEC 61966-2-1), 0 to 1."""
    return np.where(v <= 0.04045, v / 12.92, ((v + 0.055) / 1.055) ** 2.4)


def linear_to_srgb(v: np.ndarray) -> np.ndarray:
    """Encode with sRGB's curve, 0 to 1."""
    return np.where(v <= 0.0031308, v * 12.92, 1.055 * v ** (1 / 2.4) - 0.055)


def _bt709(v: np.ndarray) -> np.ndarray:
    return np.where(v < 0.081243, v / 4.5, ((v + 0.099297) / 1.099297) ** (1 / 0.45))


def _smpte240(v: np.ndarray) -> np.ndarray:
    return np.where(v < 0.0912863, v / 4.0, ((v + 0.1115722) / 1.1115722) ** (1 / 0.45))


def _pq(v: np.ndarray) -> np.ndarray:
    """Decode perceptual quantisation (SMPTE ST 2084), 1 being diffuse white."""
    root = v ** (32 / 2523)
    light = (np.maximum(root - 0.8359375, 0) / (18.8515625 - 18.6875 * root)) ** (16384 / 2610)
    return light * (10_000 / _WHITE_NITS)


def _hlg(v: np.ndarray) -> np.ndarray:
    """Decode hybrid log-gamma (ITU-R BT.2100) as a display of 1000 nits shows grey."""
    scene = np.where(v <= 0.5, v * v / 3, (np.exp((v - 0.55991073) / 0.17883277) + 0.28466892) / 12)
    return scene**1.2 * (1000 / _WHITE_NITS)


TRANSFERS: dict[int, Transfer] = {  # H.273, table 3
    **dict.fromkeys((1, 6, 14, 15), _bt709),
    4: power(2.2),
    5: power(2.8),
    7: _smpte240,
    8: power(1.0),
    SRGB_TRANSFER: srgb_to_linear,
    16: _pq,
    17: lambda v: v**2.6 * (52.37 / 48),
    18: _hlg,
}


@dataclass(frozen=True)
class Encoding:
    """What the numbers of a picture mean: primaries, transfer function, and whether black and
    white are 16 and 235 of 255, as in video."""

    primaries: tuple[float, ...] = SRGB
    transfer: Transfer = srgb_to_linear
    narrow: bool = False

    @classmethod
    def coded(cls, primaries: int, transfer: int, full: bool = True) -> Encoding | None:
        """Return what code points of H.273 mean; None where they say sRGB, or nothing."""
        points = PRIMARIES.get(primaries, SRGB)
        curve = TRANSFERS.get(transfer, srgb_to_linear)
        if points == SRGB and curve is srgb_to_linear and full:
            return None
        return cls(points, curve, not full)


def decode(pixels: np.ndarray, encoding: Encoding) -> np.ndarray:
    """Bring pixels (H, W, 1 or 3), uint8 or uint16, of an encoding to sRGB, uint8.

    A white point other than D65 is adapted by Bradford's matrix, as relative colorimetric intent
    does; what lies outside sRGB is clipped.
    """
    levels = np.iinfo(pixels.dtype).max
    values = np.arange(levels + 1, dtype=np.float64) / levels
    if encoding.narrow:
        values = np.clip((values * 255 - 16) / 219, 0, 1)
    linear = encoding.transfer(values).astype(np.float32)
    if pixels.shape[2] == 1:  # neutral stays neutral
        return _encoded(linear)[pixels]
    matrix = to_linear_srgb(encoding.primaries).astype(np.float32)
    out = np.empty(pixels.shape, np.uint8)
    rows = max(1, _STRIP // pixels.shape[1])
    for top in range(0, len(pixels), rows):
        out[top : top + rows] = _encoded(linear[pixels[top : top + rows]] @ matrix.T)
    return out


def _encoded(linear: np.ndarray) -> np.ndarray:
    return np.rint(linear_to_srgb(np.clip(linear, 0, 1)) * 255).astype(np.uint8)


@functools.cache
def to_linear_srgb(primaries: tuple[float, ...]) -> np.ndarray:
    """Return the (3, 3) matrix from linear light of such primaries to that of sRGB."""
    white = _xyz(D65)
    gains = (_BRADFORD @ white) / (_BRADFORD @ _xyz(primaries[6:]))
    adapt = np.linalg.inv(_BRADFORD) @ np.diag(gains) @ _BRADFORD
    return np.linalg.inv(_to_xyz(SRGB)) @ adapt @ _to_xyz(primaries)


def _to_xyz(primaries: tuple[float, ...]) -> np.ndarray:
    """Return the (3, 3) matrix from linear RGB to XYZ in which (1, 1, 1) is the white point."""
    columns = np.stack([_xyz(primaries[i : i + 2]) for i in (0, 2, 4)], axis=1)
    return columns * np.linalg.solve(columns, _xyz(primaries[6:]))


def _xyz(xy: tuple[float, ...]) -> np.ndarray:
    x, y = xy
    # The primaries "XYZ" have y = 0: any scale does, since white fixes it.
    return np.array([x, y, 1 - x - y]) / (y or 1)


def valid_primaries(primaries: tuple[float, ...]) -> bool:
    """Say whether primaries span a space that can be computed with."""
    try:
        return bool(np.isfinite(to_linear_srgb(primaries)).all())
    except np.linalg.LinAlgError:
        return False


class BadProfile(ValueError):
    """A profile that cannot be used; the text says why."""


def through_profile(image: Image.Image, icc: bytes) -> Image.Image:
    """Bring an image (L, RGB, CMYK or LAB) to sRGB through its ICC profile, as RGB.

    Raise BadProfile if the profile is damaged, or is of another kind of pixels.
    """
    try:
        profile = ImageCms.ImageCmsProfile(io.BytesIO(icc))
        space = profile.profile.xcolor_space.strip()
        mode = _MODES.get(space)
        if mode == "RGB" and image.mode == "L":  # a photo made grey that kept its profile
            image = image.convert("RGB")
        if mode != image.mode:
            raise BadProfile(f"is for {space} pixels, and these are {image.mode}")
        return _converted(image, profile)
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError, AttributeError) as error:
        if isinstance(error, BadProfile):
            raise
        raise BadProfile("cannot be read") from None


def from_lab(image: Image.Image) -> Image.Image:
    """Bring CIELAB pixels to sRGB."""
    return _converted(image, ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")))


def _converted(image: Image.Image, profile: ImageCms.ImageCmsProfile) -> Image.Image:
    transform = ImageCms.buildTransform(
        profile,
        ImageCms.createProfile("sRGB"),
        image.mode,
        "RGB",
        ImageCms.Intent.RELATIVE_COLORIMETRIC,
        # The black of print is a dark grey, and would leave every printed face pale.
        ImageCms.Flags.BLACKPOINTCOMPENSATION,
    )
    if image.mode == "RGB":
        steps = np.linspace(0, 255, 18).astype(np.uint8)
        grid = np.stack(np.meshgrid(steps, steps, steps), axis=-1).reshape(18, -1, 3)
        seen = np.asarray(ImageCms.applyTransform(Image.fromarray(grid), transform))
        if abs(seen.astype(int) - grid).max() <= _SAME:
            return image
    converted = ImageCms.applyTransform(image, transform)
    assert converted is not None  # it is only where the transform works in place
    return converted
