"""Read what a picture's file says of its colours and size where Pillow does not tell.

PNG chunks (W3C PNG, third edition), ISO base media boxes of AVIF, HEIF and JPEG 2000, the header of
a BMP, and GIF's extension for ICC profiles. All reading is bounded by the file.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

from PIL import Image

from hdbcli.faces.colour import (
    ADOBE_RGB,
    SRGB,
    SRGB_TRANSFER,
    UNSPECIFIED,
    Encoding,
    Transfer,
    power,
    srgb_to_linear,
    valid_primaries,
)

PNG = b"\x89PNG\r\n\x1a\n"
_LARGEST_BOX = 2**24  # bytes of metadata that are read
_GAMMA = 100_000  # PNG's unit of gAMA and cHRM
_LIKE_SRGB = 0.01  # gAMA within this of 1/2.2 stands for sRGB's own curve, as writers mean it
_CHROMATICITY = 0.002
# HEIF and AVIF files of other tools often carry a video's label on sRGB pixels.
_VIDEO = (1, 6, 14, 15)
_GIF_ICC = b"\x21\xff\x0bICCRGBG1012"


@dataclass(frozen=True)
class Declared:
    """Colours as a file declares them: an ICC profile, or else an encoding, or sRGB if neither.

    `damaged` says that a profile is there and cannot be taken out of the file.
    """

    icc: bytes | None = None
    encoding: Encoding | None = None
    damaged: bool = False


def declared(file: BinaryIO, image: Image.Image) -> Declared:
    """Return what a picture's file says of its colours; the position in the file is kept."""
    icc = image.info.get("icc_profile")
    kind = image.format
    place = file.tell()
    try:
        if kind == "PNG":
            return _of_png(png_chunks(file), icc)
        encoding = None
        if kind in ("AVIF", "HEIF", "JPEG2000") and not icc:
            icc, encoding = _of_boxes(file)
        elif kind == "BMP":
            icc = _of_bmp(file)
        elif kind == "GIF":
            icc = _of_gif(file)
        if not icc and encoding is None and _is_adobe_rgb(image):
            encoding = Encoding(ADOBE_RGB, power(563 / 256))
        lost = not icc and "icc_profile" in image.info and kind in ("JPEG", "MPO")
        return Declared(icc or None, encoding, lost)
    finally:
        file.seek(place)


def png_chunks(file: BinaryIO) -> dict[bytes, bytes]:
    """Return the chunks of a PNG before its pixels by name, the first of each."""
    file.seek(len(PNG))
    chunks: dict[bytes, bytes] = {}
    while len(head := file.read(8)) == 8:
        length, name = struct.unpack(">I4s", head)
        if name in (b"IDAT", b"IEND") or length > _LARGEST_BOX:
            break
        chunks.setdefault(name, file.read(length))
        file.seek(4, 1)
    return chunks


def _of_png(chunks: dict[bytes, bytes], icc: bytes | None) -> Declared:
    """Follow the order that the format sets: cICP, iCCP, sRGB, and last gAMA with cHRM."""
    cicp = chunks.get(b"cICP", b"")
    if len(cicp) == 4 and UNSPECIFIED not in cicp[:2]:
        return Declared(None, Encoding.coded(cicp[0], cicp[1], cicp[3] != 0))
    if icc or b"iCCP" in chunks:
        return Declared(icc, None, not icc)
    if b"sRGB" in chunks:
        return Declared()
    curve: Transfer = srgb_to_linear
    points: tuple[float, ...] = SRGB
    if len(gama := chunks.get(b"gAMA", b"")) == 4:
        gamma = struct.unpack(">I", gama)[0] / _GAMMA
        if 0.1 <= gamma <= 10 and abs(gamma * 2.2 - 1) > _LIKE_SRGB:  # else it is an accident
            curve = power(1 / gamma)
    if len(chrm := chunks.get(b"cHRM", b"")) == 32:
        white, *others = struct.iter_unpack(">II", chrm)
        found = tuple(n / _GAMMA for pair in (*others, white) for n in pair)
        far = max(abs(a - b) for a, b in zip(found, SRGB, strict=True))
        if far > _CHROMATICITY and valid_primaries(found):
            points = found
    plain = curve is srgb_to_linear and points == SRGB
    return Declared(None, None if plain else Encoding(points, curve))


def boxes(content: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Yield the names and contents of ISO base media boxes that lie side by side."""
    start = 0
    while start + 8 <= len(content):
        size, name = struct.unpack_from(">I4s", content, start)
        head = 8
        if size == 1 and start + 16 <= len(content):
            size, head = struct.unpack_from(">Q", content, start + 8)[0], 16
        elif size == 0:
            size = len(content) - start
        if size < head:
            return
        yield name, content[start + head : start + size]
        start += size


def _properties(file: BinaryIO) -> list[tuple[bytes, bytes]]:
    """Return the boxes that describe pictures: those in meta/iprp/ipco, or in JPEG 2000's jp2h."""
    file.seek(0)
    while len(head := file.read(8)) == 8:
        size, name = struct.unpack(">I4s", head)
        head_size = 8
        if size == 1:
            size, head_size = struct.unpack(">Q", file.read(8).rjust(8, b"\0"))[0], 16
        if name in (b"meta", b"jp2h"):
            inside = file.read(min(max(size - head_size, 0) or _LARGEST_BOX, _LARGEST_BOX))
            if name == b"jp2h":
                return list(boxes(inside))
            parts = dict(boxes(inside[4:]))  # after version and flags
            return list(boxes(dict(boxes(parts.get(b"iprp", b""))).get(b"ipco", b"")))
        if size < head_size:
            break
        file.seek(size - head_size, 1)
    return []


def _of_boxes(file: BinaryIO) -> tuple[bytes | None, Encoding | None]:
    colours = [content for name, content in _properties(file) if name == b"colr"]
    for content in colours:
        if content[:4] in (b"prof", b"rICC"):
            return content[4:], None
        if content[:1] in (b"\2", b"\3"):  # JPEG 2000: method, precedence, approximation
            return content[3:], None
    for content in colours:
        if content[:4] == b"nclx" and len(content) >= 11:
            primaries, transfer = struct.unpack_from(">HH", content, 4)
            return None, Encoding.coded(
                primaries, SRGB_TRANSFER if transfer in _VIDEO else transfer
            )
    return None, None


def is_turned(file: BinaryIO) -> bool:
    """Say whether an AVIF or HEIF turns or mirrors its pictures by properties of the container."""
    return any(name in (b"irot", b"imir") for name, _ in _properties(file))


def largest_size(file: BinaryIO) -> tuple[int, int]:
    """Return width and height of the largest picture in an AVIF or HEIF, before it is opened."""
    sizes = [
        struct.unpack_from(">II", content, 4)
        for name, content in _properties(file)
        if name == b"ispe" and len(content) >= 12
    ]
    file.seek(0)
    return max(sizes, key=lambda size: size[0] * size[1], default=(0, 0))


def _of_bmp(file: BinaryIO) -> bytes | None:
    """Return the profile of a BMP with a header of version 5."""
    file.seek(14)
    head = file.read(124)
    if len(head) < 124 or head[56:60] != b"DEBM":  # "MBED", little-endian
        return None
    offset, size = struct.unpack_from("<II", head, 112)
    file.seek(14 + offset)
    return file.read(min(size, _LARGEST_BOX))


def _of_gif(file: BinaryIO) -> bytes | None:
    file.seek(0)
    content = file.read(_LARGEST_BOX)
    at = content.find(_GIF_ICC)
    if at < 0:
        return None
    at += len(_GIF_ICC)
    parts = []
    while at < len(content) and (size := content[at]):
        parts.append(content[at + 1 : at + 1 + size])
        at += 1 + size
    return b"".join(parts)


def _is_adobe_rgb(image: Image.Image) -> bool:
    """Say whether EXIF names Adobe RGB, as cameras do that embed no profile (DCF, "R03")."""
    try:
        return str(image.getexif().get_ifd(0xA005).get(1, "")).startswith("R03")
    except Exception:  # damaged EXIF raises what it likes; the pixels are whole
        return False
