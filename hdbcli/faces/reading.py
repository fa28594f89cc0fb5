"""Read a photo of any kind as upright sRGB pixels: the one way in which pictures come in."""

from __future__ import annotations

import logging
import os
import struct
import sys
import warnings
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import BinaryIO

import cv2
import numpy as np
from PIL import Image, ImageFile, UnidentifiedImageError

from hdbcli.faces.colour import BadProfile, decode, from_lab, through_profile
from hdbcli.faces.colour_tags import PNG, Declared, declared, is_turned, largest_size, png_chunks
from hdbcli.faces.source import KINDS, opened, shown
from registry.errors import HdbError

MAX_PIXELS = 64_000_000  # 192 MB of RGB; what phones save by themselves ends at 50 megapixels
GREY = (128, 128, 128)
Warn = Callable[[str], None]

# What Pillow and its codecs raise on damaged files, as found by damaging some.
_BROKEN = (struct.error, zlib.error, EOFError, MemoryError, OverflowError, RuntimeError, cv2.error)
_DAMAGE = (*_BROKEN, OSError, SyntaxError, ValueError, TypeError, LookupError, AttributeError)
# ImageOps.exif_transpose would also write the EXIF block anew, and fail on odd ones.
_TURNS = Image.Transpose
_UPRIGHT = {2: _TURNS.FLIP_LEFT_RIGHT, 3: _TURNS.ROTATE_180, 4: _TURNS.FLIP_TOP_BOTTOM}
_UPRIGHT |= {5: _TURNS.TRANSPOSE, 6: _TURNS.ROTATE_270, 7: _TURNS.TRANSVERSE, 8: _TURNS.ROTATE_90}
_HEIC = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs", b"mif1", b"msf1")
_MAGIC = {
    b"\xff\xd8\xff": "JPEG",
    PNG: "PNG",
    b"GIF8": "GIF",
    b"BM": "BMP",
    b"II*\0": "TIFF",
    b"MM\0*": "TIFF",
    b"II+\0": "TIFF",
    b"MM\0+": "TIFF",
    b"\0\0\0\x0cjP  ": "JPEG2000",
    b"\xff\x4f\xff\x51": "JPEG2000",
    **{f"P{digit}".encode(): "PPM" for digit in "123456fF"},
}
_OTHER = {  # what people hand over, by how it begins
    b"%PDF": "a PDF",
    b"<svg": "a drawing (SVG)",
    b"<?xml": "an XML file",
    b"<!doctype": "a web page",
    b"<html": "a web page",
    b"\xff\x0a": "a JPEG XL picture",
    b"\0\0\0\x0cJXL ": "a JPEG XL picture",
    b"8BPS": "a Photoshop file",
    b"FUJIFILMCCD": "a camera raw file",
    b"IIU\0": "a camera raw file",
    b"IIRO": "a camera raw file",
    b"\x1aE\xdf\xa3": "a video",
    b"PK\3\4": "a ZIP archive",
}
# Tags of TIFF.
_NEW_SUBFILE, _BITS, _PHOTOMETRIC, _PLANAR = 254, 258, 262, 284
_EXTRA, _KIND, _DNG = 338, 339, 50706
_LOUD = ("TIFF", "JPEG2000")  # their libraries write to standard error
_ADVICE = "export the photo as JPEG"
# Pillow logs some damage that it also raises, which would be a second line.
logging.getLogger("PIL").addHandler(logging.NullHandler())


def read_photo(path: Path, warn: Warn = lambda _: None) -> np.ndarray:
    """Read a photo as upright sRGB, (H, W, 3) uint8; its content decides, not its name.

    JPEG, PNG, WebP, HEIC, AVIF, TIFF, GIF, BMP, JPEG 2000 and PPM, of animations the first picture;
    `-` is standard input. Colours go through the profile that the file carries; a profile that
    cannot be used is ignored, which `warn` is told. Transparent parts become mid grey: around a
    cut-out head black or white would draw an edge that is not the person's, and grey is the middle
    of what the networks see. Raise HdbError for anything that is not a whole picture, and before
    decoding for more than MAX_PIXELS.
    """
    try:
        with opened(path) as file:
            return _decoded(path, file, warn)
    except PermissionError:
        raise HdbError(f"{path}: permission denied; make the photo readable") from None
    except Image.DecompressionBombError:
        raise _too_large(path, "far more pixels than that") from None
    except _DAMAGE as error:
        # Some codecs name the file object, or say nothing.
        reason = " ".join(str(error).split()) or "no header"
        advice = "it may be damaged or cut short, copy or export the photo again"
        if isinstance(error, UnidentifiedImageError):  # for either reason
            reason = "no header, or pixels of a kind that is not read here"
            advice = "it may be damaged or cut short, copy the photo again or export it as JPEG"
        raise HdbError(f"{shown(path)} cannot be read ({reason}); {advice}") from None


def _decoded(path: Path, file: BinaryIO, warn: Warn) -> np.ndarray:
    kind = _kind(path, file)
    if kind in ("AVIF", "HEIF"):
        _check_size(path, *largest_size(file))
    with warnings.catch_warnings():
        # Pillow's own limit is higher than ours, and its remarks on odd metadata help no one here.
        warnings.simplefilter("ignore")
        with Image.open(file, formats=(kind,)) as image:
            _check_size(path, image.width, image.height)
            if kind == "TIFF":
                _choose_page(path, image)
            if kind == "PNG":
                _mend_grey_key(file, image)
            orientation = _forgotten_orientation(file, image) if kind == "HEIF" else 0
            colours, is_deep = declared(file, image), _is_deep(file, image)
            with _quiet() if kind in _LOUD or is_deep else nullcontext():
                image.load()
                # Only what Pillow could read: its reasons are the clearer ones.
                deep = _deep(file, image.size) if is_deep else None
            turn = _UPRIGHT.get(orientation or _orientation(image))
            if deep is None:
                deep = _numbers(image)
            if deep is not None:
                rgb, alpha = _from_numbers(deep, colours, path, warn)
            else:
                rgb, alpha = _from_image(image, colours, path, warn)
    if alpha is not None:
        backdrop = Image.new("RGB", rgb.size, GREY)
        backdrop.paste(rgb, mask=alpha)
        rgb = backdrop
    return np.array(rgb if turn is None else rgb.transpose(turn))


def _kind(path: Path, file: BinaryIO) -> str:
    """Return the name that Pillow has for the format of a file; refuse what is not a picture."""
    head = file.read(64)
    file.seek(0)
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return "WEBP"
    if head[4:8] == b"ftyp":
        return _kind_of_media(path, head)
    if head[:4] == b"II*\0" and head[8:10] == b"CR":
        raise HdbError(f"{shown(path)} is a camera raw file; {_ADVICE}")
    for magic, name in _MAGIC.items():
        if head.startswith(magic):
            return name
    beginning = head.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    for magic, name in _OTHER.items():
        if head.startswith(magic) or beginning.startswith(magic):
            advice = "save the photo itself" if name == "a web page" else _ADVICE
            raise HdbError(f"{shown(path)} is {name}, whatever its name says; {advice}")
    raise HdbError(f"{shown(path)} is no {KINDS} picture, whatever its name says; {_ADVICE}")


def _kind_of_media(path: Path, head: bytes) -> str:
    size = max(int.from_bytes(head[:4], "big"), 16)
    brands = [head[8:12], *(head[i : i + 4] for i in range(16, min(size, len(head)), 4))]
    if any(brand in (b"avif", b"avis") for brand in brands):
        return "AVIF"
    if any(brand in _HEIC for brand in brands):
        try:
            import pillow_heif
        except ImportError as error:  # it is built for fewer systems than Pillow
            raise HdbError(
                f"{shown(path)} is a HEIC picture, and pillow-heif does not load ({error}); "
                f"{_ADVICE}"
            ) from None
        pillow_heif.register_heif_opener()
        return "HEIF"
    name = "a camera raw file" if brands[0] == b"crx " else "a video"
    raise HdbError(f"{shown(path)} is {name}, whatever its name says; {_ADVICE}")


def _check_size(path: Path, width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise _too_large(path, f"{width} x {height} pixels")


def _too_large(path: Path, values: str) -> HdbError:
    limit = f"{MAX_PIXELS // 1_000_000} megapixels"
    return HdbError(
        f"{shown(path)} is over the limit of {limit} ({values}); scale it down or crop it"
    )


def _choose_page(path: Path, image: ImageFile.ImageFile) -> None:
    """Go to the first page of a TIFF that is not a preview of another; refuse camera raw files."""
    tags = image.tag_v2  # type: ignore[attr-defined]
    for page in range(getattr(image, "n_frames", 1)):
        image.seek(page)
        tags = image.tag_v2  # type: ignore[attr-defined]
        if _DNG in tags:
            break
        if not tags.get(_NEW_SUBFILE, 0) & 1:
            _check_size(path, image.width, image.height)
            bits = tags.get(_BITS, ())
            if tags.get(_PLANAR) == 2 and len(bits) > 1 and max(bits) > 8:
                # Neither Pillow nor OpenCV puts such colours together.
                raise HdbError(f"{shown(path)} stores its 16-bit colours apart; {_ADVICE}")
            return
    raise HdbError(f"{shown(path)} is a camera raw file, or a preview alone; {_ADVICE}")


def _mend_grey_key(file: BinaryIO, image: Image.Image) -> None:
    """Spread the transparent level of a grey PNG of 2 or 4 bits as Pillow spreads its pixels."""
    key, place = image.info.get("transparency"), file.tell()
    if image.mode == "L" and isinstance(key, int):
        highest = 2 ** _header(file)[0] - 1
        if key <= highest:
            image.info["transparency"] = key * 255 // highest
        file.seek(place)


def _orientation(image: Image.Image) -> int:
    try:
        value = image.getexif().get(0x0112, 1)
    except _DAMAGE:  # the pixels are whole: show them as they lie, as viewers do
        return 1
    return value if isinstance(value, int) else 1


def _forgotten_orientation(file: BinaryIO, image: Image.Image) -> int:
    """Return the EXIF orientation of a HEIF that does not turn by itself, 0 for others.

    The format turns by properties, which libheif has applied, and EXIF is to be ignored; but some
    writers rely on EXIF alone.
    """
    place = file.tell()
    told = image.info.get("original_orientation")
    turned = is_turned(file)
    file.seek(place)
    return 0 if turned or not isinstance(told, int) else told


def _is_deep(file: BinaryIO, image: ImageFile.ImageFile) -> bool:
    """Say whether an image has colours of 16 bits, of which Pillow keeps the upper eight alone."""
    if image.format == "PNG":
        depth, colour = _header(file)
        return depth == 16 and colour in (2, 4, 6)
    if image.format != "TIFF" or image.tell():
        return False
    tags = image.tag_v2  # type: ignore[attr-defined]
    bits, extra, kind = tags.get(_BITS, ()), tags.get(_EXTRA, ()), tags.get(_KIND, (1,))
    plain = tags.get(_PHOTOMETRIC) == 2 and kind[0] == 1
    return plain and tuple(bits) in ((16,) * 3, (16,) * 4) and tuple(extra) in ((), (2,))


def _header(file: BinaryIO) -> tuple[int, int]:
    """Return the bits of a sample and the colour type of a PNG."""
    depth, colour = png_chunks(file)[b"IHDR"][8:10]
    return depth, colour


def _deep(file: BinaryIO, size: tuple[int, int]) -> np.ndarray | None:
    """Read colours of 16 bits with OpenCV: (H, W, 3 or 4) uint16 with alpha last, or None."""
    file.seek(0)
    content = file.read()
    pixels = cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_UNCHANGED)
    if pixels is None or pixels.dtype != np.uint16 or pixels.ndim != 3:
        return None
    if pixels.shape[1::-1] != size:
        return None
    if content.startswith(PNG) and content[25] == 4:  # OpenCV makes colours of grey
        return pixels[..., [2, 3]]
    pixels = pixels[..., [2, 1, 0, 3][: pixels.shape[2]]]
    if pixels.shape[2] == 3 and content.startswith(PNG):
        key = png_chunks(file).get(b"tRNS", b"")
        if len(key) == 6:
            hidden = (pixels == np.frombuffer(key, ">u2")).all(2)
            pixels = np.dstack([pixels, np.where(hidden, 0, 65535).astype(np.uint16)])
    return pixels


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep what the C libraries say of damaged files off standard error: one line is enough."""
    logs = getattr(cv2.utils, "logging", cv2)
    level = logs.setLogLevel(0)
    sys.stderr.flush()
    kept = os.dup(2)
    try:
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        logs.setLogLevel(level)


def _numbers(image: Image.Image) -> np.ndarray | None:
    """Return grey pixels of more than 8 bits as (H, W, 1 or 2) uint16 with alpha last, else None.

    Whole numbers of 32 bits and fractions say no range: up to 1 they are taken as 0 to 1, else up
    to 255 as 0 to 255, else as 0 to 65535 or to the largest.
    """
    if image.mode != "F" and not image.mode.startswith("I"):
        return None
    values = np.asarray(image)
    tags = getattr(image, "tag_v2", {})
    if image.mode == "F" or (image.mode == "I" and image.format == "TIFF"):
        if image.mode == "I" and tags.get(_KIND, (1,))[0] == 1:
            values = values.view(np.uint32)  # Pillow takes the upper half for negative numbers
        values = np.nan_to_num(values.astype(np.float32), posinf=0, neginf=0)
        top = float(values.max(initial=0))
        ranges = [1, 255, 65535] if image.mode == "F" else [255, 65535]
        if tags.get(_KIND, (1,))[0] == 2 and tags.get(_BITS, (32,))[0] == 16:
            ranges = [32767]  # of 16 bits with a sign
        values = values / next((limit for limit in ranges if top <= limit), top) * 65535
    elif image.format == "TIFF" and (bits := int(tags.get(_BITS, (16,))[0])) < 16:
        values = values.astype(np.float32) * (65535 / (2**bits - 1))
    values = np.clip(np.rint(values), 0, 65535).astype(np.uint16)[..., None]
    if tags.get(_PHOTOMETRIC) == 0:  # white is 0, which Pillow minds at 8 bits alone
        values = 65535 - values
    key = image.info.get("transparency")
    if isinstance(key, int):
        values = np.dstack([values, np.where(values == key, 0, 65535).astype(np.uint16)])
    return values


def _from_numbers(
    pixels: np.ndarray, colours: Declared, path: Path, warn: Warn
) -> tuple[Image.Image, Image.Image | None]:
    """Bring pixels (H, W, 1 to 4) uint16 to sRGB; return RGB and alpha."""
    channels = pixels.shape[2]
    alpha = Image.fromarray(_eight_bits(pixels[..., -1])) if channels in (2, 4) else None
    pixels = pixels[..., : channels - (alpha is not None)]
    if colours.encoding is not None:
        pixels = decode(pixels, colours.encoding)
    else:
        pixels = _eight_bits(pixels)
    image = Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels)
    return _profiled(image, colours, path, warn), alpha


def _eight_bits(values: np.ndarray) -> np.ndarray:
    return ((values.astype(np.uint32) + 128) // 257).astype(np.uint8)


def _from_image(
    image: Image.Image, colours: Declared, path: Path, warn: Warn
) -> tuple[Image.Image, Image.Image | None]:
    """Bring an image of 8 bits or fewer to sRGB; return RGB and alpha."""
    alpha = None
    grey = image.mode in ("1", "L", "LA", "La")
    if image.has_transparency_data:
        alpha = image.convert("RGBA").getchannel("A")
    if image.mode == "La":  # grey times alpha
        image = image.convert("LA")
    if grey:
        image = image.convert("L") if image.mode != "LA" else image.getchannel("L")
    elif image.mode not in ("CMYK", "LAB"):
        image = image.convert("RGBA" if alpha else "RGB").convert("RGB")
    if colours.encoding is not None and image.mode in ("L", "RGB"):
        pixels = decode(np.atleast_3d(np.asarray(image)), colours.encoding)
        image = Image.fromarray(pixels[..., 0] if grey else pixels)
    return _profiled(image, colours, path, warn), alpha


def _profiled(image: Image.Image, colours: Declared, path: Path, warn: Warn) -> Image.Image:
    trouble = "is damaged" if colours.damaged else ""
    if colours.icc:
        try:
            return through_profile(image, colours.icc)
        except BadProfile as error:
            trouble = str(error)
    if trouble:
        warn(
            f"the colour profile of {shown(path)} {trouble}: it is ignored, and colours may be "
            "off; export the photo as sRGB"
        )
    return from_lab(image) if image.mode == "LAB" else image.convert("RGB")
