"""Colours, depths and containers of photos: what comes out is what the file means, as sRGB."""

from __future__ import annotations

import io
import os
import struct
import subprocess
import sys
import threading
import zlib
from pathlib import Path

import cv2
import numpy as np
import pillow_heif
import pytest
import torch
from chips import likeness
from PIL import Image, ImageCms, ImageOps
from profiles import SPACES, cmyk_profile, grey_profile, in_space, rgb_profile

from hdbcli import api
from hdbcli.faces import colour
from hdbcli.faces.dlib import load_dlib
from hdbcli.faces.photo import crop_face
from hdbcli.faces.reading import read_photo
from hdbcli.identity.file import Identity
from hdbcli.model.base import Base
from registry.errors import HdbError
from registry.tiny import TEMPLATE

pillow_heif.register_heif_opener()

# Format, suffix, options that lose least, and levels that its coding alone may cost.
FORMATS = {
    "jpeg": ("JPEG", {"quality": 100, "subsampling": 0}, 0.8),
    "png": ("PNG", {}, 0.0),
    "webp": ("WEBP", {"lossless": True}, 0.0),
    "heic": ("HEIF", {"quality": -1, "chroma": 444}, 0.5),
    "avif": ("AVIF", {"quality": 100, "subsampling": "4:4:4"}, 1.0),
    "tiff": ("TIFF", {}, 0.0),
    "tiff lzw": ("TIFF", {"compression": "tiff_lzw"}, 0.0),
    "tiff deflate": ("TIFF", {"compression": "tiff_adobe_deflate"}, 0.0),
    "tiff jpeg": ("TIFF", {"compression": "jpeg", "quality": 100}, 1.2),
    "big tiff": ("TIFF", {"big_tiff": True}, 0.0),
    "mpo": ("MPO", {"quality": 100, "subsampling": 0}, 0.8),
    "apng": ("PNG", {"save_all": True}, 0.0),
    "moving webp": ("WEBP", {"save_all": True, "lossless": True}, 0.0),
    "moving avif": ("AVIF", {"save_all": True, "quality": 100, "subsampling": "4:4:4"}, 1.0),
}
PLAIN = {"bmp": ("BMP", {}, 0.0), "gif": ("GIF", {}, 9.0), "ppm": ("PPM", {}, 0.0)}


@pytest.fixture(scope="module")
def picture(astronaut: Path) -> np.ndarray:
    return np.asarray(Image.open(astronaut).convert("RGB").crop((120, 30, 312, 190)))


def difference(a: np.ndarray, b: np.ndarray) -> float:
    return float(abs(a.astype(float) - b).mean())


def saved(path: Path, image: Image.Image, form: str, **options: object) -> Path:
    if options.get("save_all") or form == "MPO":
        options |= {"append_images": [ImageOps.invert(image)], "save_all": True}
    image.save(path, form, **options)
    return path


def silent(text: str) -> None:
    raise AssertionError(f"unexpected warning: {text}")


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("space", SPACES)
def test_colours_of_every_profile_and_format_come_back(
    tmp_path: Path, picture: np.ndarray, form: str, space: str
) -> None:
    kind, options, coding = FORMATS[form]
    profile = rgb_profile(space)
    moved = in_space(picture, profile)
    path = saved(tmp_path / "photo", moved, kind, icc_profile=profile, **options)
    # ProPhoto's steps are wider, so the same coding costs more there.
    limit = 0.3 + coding * (1.6 if space == "ProPhoto" else 1.2)
    assert difference(read_photo(path, silent), picture) < limit
    # The control: the same numbers without a profile are off by more.
    bare = saved(tmp_path / "bare", moved, kind, **options)
    assert (difference(read_photo(bare), picture) > 1.5) == (space != "sRGB")


@pytest.mark.parametrize("form", PLAIN)
def test_formats_without_profiles(tmp_path: Path, picture: np.ndarray, form: str) -> None:
    kind, options, coding = PLAIN[form]
    path = saved(tmp_path / "photo", Image.fromarray(picture), kind, **options)
    assert difference(read_photo(path, silent), picture) <= coding


def test_bmp_gif_and_jpeg2000_carry_profiles_too(tmp_path: Path, picture: np.ndarray) -> None:
    profile = rgb_profile("Display P3")
    moved = in_space(picture, profile)
    pixels = np.flip(np.asarray(moved), (0, 2)).tobytes()  # rows from below, blue first
    height, width = picture.shape[:2]
    head = struct.pack("<IiiHHIIiiII", 124, width, height, 1, 24, 0, len(pixels), 0, 0, 0, 0)
    head += bytes(16) + b"DEBM" + bytes(36 + 12 + 4)
    head += struct.pack("<III", 124 + len(pixels), len(profile), 0)
    offset = 14 + len(head)
    start = b"BM" + struct.pack("<IHHI", offset + len(pixels) + len(profile), 0, 0, offset)
    (tmp_path / "bmp").write_bytes(start + head + pixels + profile)
    assert len(head) == 124

    gif = io.BytesIO()
    few = moved.quantize(256)
    few.save(gif, "GIF")
    blocks = b"".join(
        bytes([len(part)]) + part
        for part in (profile[i : i + 255] for i in range(0, len(profile), 255))
    )
    at = 13 + 3 * 2 ** ((gif.getvalue()[10] & 7) + 1)  # after the global palette
    content = gif.getvalue()
    extension = b"\x21\xff\x0bICCRGBG1012" + blocks + b"\0"
    (tmp_path / "gif").write_bytes(content[:at] + extension + content[at:])

    jp2 = io.BytesIO()
    moved.save(jp2, "JPEG2000")
    content = jp2.getvalue()
    at = content.index(b"colr") - 4
    old = int.from_bytes(content[at : at + 4], "big")
    box = struct.pack(">I4sBBB", 11 + len(profile), b"colr", 2, 0, 0) + profile
    outer = content.index(b"jp2h") - 4
    size = int.from_bytes(content[outer : outer + 4], "big") + len(box) - old
    content = content[:at] + box + content[at + old :]
    (tmp_path / "jp2").write_bytes(content[:outer] + struct.pack(">I", size) + content[outer + 4 :])

    assert difference(np.asarray(moved), picture) > 1.5  # the control
    assert difference(read_photo(tmp_path / "bmp", silent), picture) < 0.3
    assert difference(read_photo(tmp_path / "jp2", silent), picture) < 0.3
    through = colour.through_profile(few.convert("RGB"), profile)
    assert np.array_equal(read_photo(tmp_path / "gif", silent), np.asarray(through))
    assert difference(np.asarray(through), np.asarray(few.convert("RGB"))) > 1.5


def in_inks(picture: np.ndarray) -> Image.Image:
    """Print a picture with the inks that `cmyk_profile` tells the colours of."""
    light = np.clip((picture / 255 - 0.08) / 0.92, 0, 1)
    inks = np.dstack([np.rint(255 * (1 - light)), np.zeros(picture.shape[:2])])
    return Image.fromarray(inks.astype(np.uint8), "CMYK")


@pytest.mark.parametrize("kind", ["JPEG", "TIFF"])
def test_print_goes_through_its_inks(tmp_path: Path, picture: np.ndarray, kind: str) -> None:
    """A table over inks has no way back here: build the inks from the same formula instead."""
    image = in_inks(picture)
    options = {"quality": 98, "subsampling": 0} if kind == "JPEG" else {}
    path = saved(tmp_path / "print", image, kind, icc_profile=cmyk_profile(), **options)
    assert difference(read_photo(path, silent), picture) < 12
    assert abs(read_photo(path).mean((0, 1)) - picture.mean((0, 1))).max() < 8
    assert difference(255 - read_photo(path), picture) > 40


def test_grey_profiles_and_grey_pixels_of_colour_profiles(
    tmp_path: Path, picture: np.ndarray
) -> None:
    grey = np.asarray(Image.fromarray(picture).convert("L"))
    linear = np.rint(colour.srgb_to_linear(grey / 255) * 255).astype(np.uint8)
    path = tmp_path / "grey.png"
    Image.fromarray(linear).save(path, icc_profile=grey_profile(1.0))
    assert difference(read_photo(path, silent), grey[..., None]) < 4  # 8 linear bits are few
    Image.fromarray(linear).save(path)
    assert difference(read_photo(path), grey[..., None]) > 25
    Image.fromarray(grey).save(path, icc_profile=rgb_profile("Display P3"))  # as convert("L") does
    assert difference(read_photo(path, silent), grey[..., None]) < 1


@pytest.mark.parametrize("damage", ["cut", "noise", "other pixels", "chunk"])
def test_an_unusable_profile_is_ignored_and_told(
    tmp_path: Path, picture: np.ndarray, damage: str
) -> None:
    profile = rgb_profile("Display P3")
    profile = {"cut": profile[:200], "noise": bytes(400), "other pixels": cmyk_profile(3)}.get(
        damage, profile
    )
    path = tmp_path / "photo.png"
    Image.fromarray(picture).save(path, icc_profile=profile)
    if damage == "chunk":
        content = bytearray(path.read_bytes())
        at = content.index(b"iCCP")
        size = int.from_bytes(content[at - 4 : at], "big")
        content[at + 20 : at + 4 + size] = bytes(size - 16)
        content[at + 4 + size : at + 8 + size] = struct.pack(
            ">I", zlib.crc32(content[at : at + 4 + size])
        )
        path.write_bytes(content)
    told: list[str] = []
    assert np.array_equal(read_photo(path, told.append), picture)
    assert len(told) == 1 and "colour profile" in told[0] and "photo.png" in told[0]


def png_with(path: Path, picture: np.ndarray, *chunks: tuple[bytes, bytes]) -> Path:
    """Write a PNG, of 8 or 16 bits, with more chunks after its header."""
    order = [2, 1, 0, 3][: picture.shape[2]] if picture.ndim == 3 else slice(None)
    content = cv2.imencode(".png", picture[..., order])[1].tobytes()
    more = b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        for name, data in chunks
    )
    path.write_bytes(content[:33] + more + content[33:])
    return path


GAMMA = b"gAMA", struct.pack(">I", 100_000)
P3_POINTS = (
    b"cHRM",
    struct.pack(
        ">8I", *(round(v * 100_000) for v in (0.3127, 0.329, 0.68, 0.32, 0.265, 0.69, 0.15, 0.06))
    ),
)


def test_png_says_its_colours_in_chunks(tmp_path: Path, picture: np.ndarray) -> None:
    """cICP wins over iCCP, that over sRGB, and that over gAMA and cHRM."""
    path = tmp_path / "photo.png"
    p3 = np.asarray(in_space(picture, rgb_profile("Display P3")))
    light = colour.srgb_to_linear(picture / 255)
    linear = np.rint(light * 65535).astype(np.uint16)
    cicp = b"cICP", bytes([12, 13, 0, 1])
    srgb = b"sRGB", b"\0"
    icc = b"iCCP", b"p\0\0" + zlib.compress(rgb_profile("Adobe RGB"))
    for pixels, *chunks in (
        (p3, cicp),
        (p3, cicp, icc),
        (p3, cicp, srgb, GAMMA),
        (p3, P3_POINTS),
        (linear, GAMMA),
        (picture, srgb, GAMMA, P3_POINTS),
        (picture, (b"gAMA", struct.pack(">I", 45455))),  # what writers of sRGB mean by it
        (picture, (b"gAMA", bytes(4))),
    ):
        assert difference(read_photo(png_with(path, pixels, *chunks)), picture) < 0.3, chunks
    assert difference(read_photo(png_with(path, p3)), picture) > 1.5
    assert difference(read_photo(png_with(path, linear)), picture) > 25
    adobe = np.asarray(in_space(picture, rgb_profile("Adobe RGB")))
    assert difference(read_photo(png_with(path, adobe, icc, GAMMA, P3_POINTS)), picture) < 0.3
    power = np.rint((picture / 255) ** (2.2 / 1.8) * 255).astype(np.uint8)  # an old Macintosh
    told = read_photo(png_with(path, power, (b"gAMA", struct.pack(">I", 55556))))
    assert difference(told, picture) < 3 < difference(power, picture)


def test_hdr_white_is_white_and_its_grey_is_grey(tmp_path: Path) -> None:
    """203 nits are diffuse white: at 58 % of PQ and 75 % of HLG (ITU-R BT.2408, table 1)."""
    for transfer, level in ((16, 0.5807), (18, 0.75)):
        pixels = np.full((8, 8, 3), round(level * 65535), np.uint16)
        path = png_with(tmp_path / "hdr.png", pixels, (b"cICP", bytes([9, transfer, 0, 1])))
        assert (read_photo(path) >= 253).all()
        path = png_with(tmp_path / "hdr.png", pixels // 2, (b"cICP", bytes([9, transfer, 0, 1])))
        assert 20 < read_photo(path).mean() < 150


@pytest.mark.parametrize("form", ["AVIF", "HEIF"])
def test_code_points_of_avif_and_heif(tmp_path: Path, picture: np.ndarray, form: str) -> None:
    kind, options, coding = FORMATS[{"AVIF": "avif", "HEIF": "heic"}[form]]
    p3 = in_space(picture, rgb_profile("Display P3"))
    path = saved(tmp_path / "photo", p3, kind, **options)
    content = path.read_bytes()
    at = content.index(b"nclx")
    assert content[at + 4 : at + 8] in (b"\0\1\0\x0d", b"\0\2\0\2")
    path.write_bytes(content[: at + 4] + b"\0\x0c\0\x0d" + content[at + 8 :])
    assert difference(read_photo(path, silent), picture) < 0.3 + coding
    path.write_bytes(content)
    assert difference(read_photo(path, silent), picture) > 1.5


def test_cameras_name_adobe_rgb_in_exif_alone(tmp_path: Path, picture: np.ndarray) -> None:
    adobe = in_space(picture, rgb_profile("Adobe RGB"))
    exif = Image.Exif()
    exif[0x0112] = 1
    exif.get_ifd(0x8769)[0xA001] = 65535
    exif.get_ifd(0x8769)[0xA005] = {1: "R03"}
    options = {"quality": 100, "subsampling": 0}
    path = saved(tmp_path / "photo.jpg", adobe, "JPEG", exif=exif, **options)
    if not Image.open(path).getexif().get_ifd(0xA005):
        pytest.skip("this Pillow writes no interoperability directory")
    assert difference(read_photo(path), picture) < 1.2
    assert difference(read_photo(saved(path, adobe, "JPEG", **options)), picture) > 1.5


# --- depth, alpha and layout ---


def test_sixteen_bits_are_rounded_and_not_cut(tmp_path: Path, picture: np.ndarray) -> None:
    deep = picture.astype(np.uint16) * 257
    nearly = np.where(deep > 200, deep - 100, deep)  # still nearest to the same level
    assert (nearly >> 8 != picture).mean() > 0.2  # what cutting would give
    for suffix in (".png", ".tif"):
        path = tmp_path / f"deep{suffix}"
        cv2.imwrite(str(path), nearly[..., ::-1])
        assert np.array_equal(read_photo(path, silent), picture)
    alpha = np.full((*picture.shape[:2], 1), 65535, np.uint16)
    alpha[:20] = 0
    rgba = np.dstack([nearly[..., ::-1], alpha])
    cv2.imwrite(str(tmp_path / "rgba.png"), rgba)
    seen = read_photo(tmp_path / "rgba.png", silent)
    assert (seen[:20] == 128).all() and np.array_equal(seen[20:], picture[20:])


@pytest.mark.parametrize("key", [None, 0, 30_000])
def test_sixteen_bit_grey_with_a_transparent_level(tmp_path: Path, key: int | None) -> None:
    values = np.array([[0, 257, 30_000, 30_001, 65_535]], np.uint16)
    path = tmp_path / "grey.png"
    options = {} if key is None else {"transparency": key}
    Image.fromarray(values).save(path, **options)
    expected = np.array([[0, 1, 117, 117, 255]])
    if key is not None:
        expected[values == key] = 128
    assert np.array_equal(read_photo(path), np.repeat(expected[..., None], 3, axis=2))


def test_sixteen_bit_grey_with_alpha_and_a_profile(tmp_path: Path) -> None:
    """OpenCV hands grey with alpha over as colours, which no profile of grey is for."""
    values = np.array([[[0, 65_535], [13_933, 65_535], [65_535, 65_535], [65_535, 0]]], np.uint16)
    chunks = [b"IHDR" + struct.pack(">IIBBBBB", 4, 1, 16, 4, 0, 0, 0)]
    chunks += [b"iCCP" + b"p\0\0" + zlib.compress(grey_profile(1.0))]
    chunks += [b"IDAT" + zlib.compress(b"\0" + values.astype(">u2").tobytes()), b"IEND"]
    content = b"".join(
        struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk))
        for chunk in chunks
    )
    path = tmp_path / "grey.png"
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + content)
    black, grey, white, hidden = read_photo(path, silent)[0, :, 0].tolist()
    assert (black, white, hidden) == (0, 255, 128) and abs(grey - 127) <= 1


@pytest.mark.parametrize("depth", [1, 2, 4, 8])
def test_shallow_grey_with_a_transparent_level(tmp_path: Path, depth: int) -> None:
    """The level is stored in the picture's own bits: 1 of 3 is 85 of 255."""
    highest = 2**depth - 1
    levels = np.arange(8) % (highest + 1)
    bits = "".join(format(level, f"0{depth}b") for level in levels)
    row = b"\0" + int(bits, 2).to_bytes(depth, "big")

    def chunk(name: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        )

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", 8, 1, depth, 0, 0, 0, 0))
    body = chunk(b"tRNS", b"\0\1") + chunk(b"IDAT", zlib.compress(row)) + chunk(b"IEND", b"")
    path = tmp_path / "grey.png"
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + head + body)
    expected = np.where(levels == 1, 128, levels * 255 // highest)
    assert np.array_equal(read_photo(path)[0], np.repeat(expected[:, None], 3, axis=1))


def test_sixteen_bit_colour_with_a_transparent_one(tmp_path: Path) -> None:
    pixels = np.array([[[1000, 2000, 3000], [1000, 2000, 3001], [257, 0, 65535]]], np.uint16)
    path = png_with(tmp_path / "c.png", pixels, (b"tRNS", struct.pack(">3H", 1000, 2000, 3000)))
    assert read_photo(path).tolist() == [[[128] * 3, [4, 8, 12], [1, 0, 255]]]


def cutout(image: Image.Image, mode: str) -> Image.Image:
    """Return the image in a mode with alpha: the upper rows are transparent, the next half so."""
    alpha = np.full(image.size[::-1], 255, np.uint8)
    alpha[:20], alpha[20:40] = 0, 128
    made = image.convert(mode)
    made.putalpha(Image.fromarray(alpha))
    return made


@pytest.mark.parametrize("form", ["PNG", "TIFF", "WEBP", "AVIF", "HEIF", "JPEG2000"])
@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_alpha_is_blended_into_grey(
    tmp_path: Path, picture: np.ndarray, form: str, mode: str
) -> None:
    options = next((o for kind, o, _ in FORMATS.values() if kind == form), {})
    image = Image.fromarray(picture)
    seen = read_photo(saved(tmp_path / "photo", cutout(image, mode), form, **options), silent)
    plain = np.asarray(image.convert(mode).convert("RGB"))
    loss = 4 if form in ("AVIF", "HEIF") else 0.6
    assert difference(seen[:18], 128) < loss
    assert difference(seen[22:38], (plain[22:38] + 127.5) / 2) < loss + 0.5
    assert difference(seen[42:], plain[42:]) < loss


def test_grey_of_every_depth(tmp_path: Path, picture: np.ndarray) -> None:
    grey = np.asarray(Image.fromarray(picture).convert("L"))
    path = tmp_path / "grey.tif"
    for values in (
        grey,
        grey.astype(np.uint16) * 257,
        (grey.astype(np.uint16) * 257).astype(">u2"),
        grey.astype(np.int32) * 257,
        grey.astype(np.float32),
        grey.astype(np.float32) / 255,
    ):
        Image.fromarray(values).save(path)
        assert np.array_equal(read_photo(path, silent), np.repeat(grey[..., None], 3, 2))


def tiff(pixels: np.ndarray, kind: int = 1, apart: bool = False) -> bytes:
    """Write a plain TIFF (H, W, n) of unsigned (1), signed (2) or broken (3) numbers."""
    height, width, count = pixels.shape
    data = np.moveaxis(pixels, 2, 0).tobytes() if apart else pixels.tobytes()
    strips = count if apart else 1
    tags = [(256, [width]), (257, [height]), (258, [8 * pixels.itemsize] * count), (259, [1])]
    tags += [(262, [2 if count == 3 else 1]), (273, []), (277, [count]), (278, [height])]
    tags += [(279, [len(data) // strips] * strips), (284, [2 if apart else 1])]
    tags += [(339, [kind] * count)]
    place = 8 + 2 + 12 * len(tags) + 4
    start = place + sum(4 * len(values) for _, values in tags) + 4 * strips
    head, tail = b"II*\0" + struct.pack("<IH", 8, len(tags)), b""
    for tag, values in tags:
        values = values or [start + k * (len(data) // strips) for k in range(strips)]
        raw = struct.pack(f"<{len(values)}I", *values)
        if len(values) > 1:
            raw, tail = struct.pack("<I", place + len(tail)), tail + raw
        head += struct.pack("<HHI", tag, 4, len(values)) + raw
    return (head + bytes(4) + tail).ljust(start, b"\0") + data


def test_tiffs_of_other_numbers_are_read_right_or_named(
    tmp_path: Path, picture: np.ndarray
) -> None:
    path = tmp_path / "photo.tif"
    deep = picture.astype(np.uint16) * 257
    grey = np.repeat(picture[..., :1], 3, 2)
    for pixels, kind, apart, expected in (
        (picture, 1, True, picture),
        (deep, 1, False, picture),
        ((deep[..., :1] // 2).astype(np.int16), 2, False, grey),
        (picture[..., :1].astype(np.uint32) * 0x01010101, 1, False, grey),
        (picture[..., :1].astype(np.int32), 2, False, grey),  # the control: no upper half
    ):
        path.write_bytes(tiff(pixels, kind, apart))
        assert np.array_equal(read_photo(path, silent), expected), (pixels.dtype, kind, apart)
    for pixels, kind, apart, why in (
        (deep, 1, True, "stores its 16-bit colours apart; export the photo as JPEG"),
        (
            picture.astype(np.float32),
            3,
            False,
            "of a kind that is not read here.*export it as JPEG",
        ),
    ):
        path.write_bytes(tiff(pixels, kind, apart))
        with pytest.raises(HdbError, match=why):
            read_photo(path)


def test_white_is_zero_in_some_tiffs(tmp_path: Path) -> None:
    values = np.array([[0, 257, 65_535]], np.uint16)
    path = tmp_path / "grey.tif"
    Image.fromarray(values).save(path)
    assert read_photo(path)[0, :, 0].tolist() == [0, 1, 255]
    content = path.read_bytes()
    at = content.index(struct.pack("<HHIHH", 262, 3, 1, 1, 0))
    path.write_bytes(content[: at + 8] + b"\0\0" + content[at + 10 :])
    assert read_photo(path)[0, :, 0].tolist() == [255, 254, 0]


def test_lab_and_one_bit(tmp_path: Path, picture: np.ndarray) -> None:
    image = Image.fromarray(picture)
    spaces = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
    lab = ImageCms.profileToProfile(image, *spaces, outputMode="LAB")
    assert lab is not None
    assert difference(read_photo(saved(tmp_path / "lab.tif", lab, "TIFF"), silent), picture) < 1
    bits = image.convert("1")
    fax = saved(tmp_path / "fax.tif", bits, "TIFF", compression="group4")
    assert np.array_equal(read_photo(fax)[..., 0] > 0, np.asarray(bits))


def test_the_first_page_that_is_no_preview(tmp_path: Path, picture: np.ndarray) -> None:
    image = Image.fromarray(picture)
    path = tmp_path / "pages.tif"
    image.save(path, save_all=True, append_images=[ImageOps.invert(image)])
    assert np.array_equal(read_photo(path), picture)
    preview = image.reduce(4)
    preview.encoderinfo = {"tiffinfo": {254: 1}}
    preview.save(path, save_all=True, append_images=[image], tiffinfo={254: 1})
    content = path.read_bytes()
    if Image.open(path).tag_v2.get(254) == 1:
        second = content.rindex(struct.pack("<HHII", 254, 4, 1, 1))
        path.write_bytes(content[: second + 8] + bytes(4) + content[second + 12 :])
    assert read_photo(path).shape == picture.shape
    preview.save(path, tiffinfo={254: 1})
    with pytest.raises(HdbError, match="preview"):
        read_photo(path)


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "TIFF", "HEIF", "AVIF", "MPO"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_in_every_container(
    tmp_path: Path, picture: np.ndarray, form: str, orientation: int
) -> None:
    undo = {1: 0, 2: 0, 3: 2, 4: 2, 5: 1, 6: 1, 7: -1, 8: -1}[orientation]
    lying = np.rot90(picture[:, ::-1] if orientation in {2, 4, 5, 7} else picture, undo).copy()
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = saved(tmp_path / "photo", Image.fromarray(lying), form, exif=exif, quality=95)
    seen = read_photo(path)
    assert seen.shape == picture.shape and difference(seen, picture) < 6
    assert difference(seen[::-1, ::-1], picture) > 20


# --- where photos come from ---

READ = """
import sys
from pathlib import Path
from registry.errors import HdbError
from hdbcli.faces.dlib import load_dlib
from hdbcli.faces.photo import crop_face
from hdbcli.faces.reading import read_photo
from registry.tiny import TEMPLATE
try:
    print(read_photo(Path(sys.argv[1])).sum())
except HdbError as error:
    print("refused", error)
"""


def test_standard_input(astronaut: Path) -> None:
    command = [sys.executable, "-c", READ, "-"]
    expected = str(read_photo(astronaut).sum())
    for content, answer in ((astronaut.read_bytes(), expected), (b"", "refused standard input is")):
        done = subprocess.run(command, input=content, capture_output=True, timeout=60, check=True)
        assert done.stdout.decode().startswith(answer)
        assert not done.stderr


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no pipes with names")
def test_a_pipe_is_read_as_a_file(tmp_path: Path, astronaut: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    writer = threading.Thread(target=pipe.write_bytes, args=(astronaut.read_bytes(),))
    writer.start()
    assert np.array_equal(read_photo(pipe), read_photo(astronaut))
    writer.join()


@pytest.mark.parametrize(
    "url", ["https://example.org/me.jpg", "ftp://example.org/me.png", "data:image/png;base64,iV"]
)
def test_a_url_is_told(url: str) -> None:
    with pytest.raises(HdbError, match="is a URL, and hdb does not download"):
        read_photo(Path(url))
    with pytest.raises(HdbError, match="no such file"):
        read_photo(Path("https"))


def test_file_urls_are_paths(astronaut: Path) -> None:
    with pytest.raises(HdbError, match="without file://"):
        read_photo(Path(f"file://{astronaut}"))


@pytest.mark.parametrize("form", ["TIFF", "BMP", "GIF", "HEIF", "AVIF", "WEBP"])
def test_too_large_is_told_by_the_header(tmp_path: Path, form: str) -> None:
    """A header that promises more than 64 megapixels is refused, whatever follows."""
    path = saved(tmp_path / "photo", Image.new("RGB", (64, 48)), form)
    content = bytearray(path.read_bytes())
    if form == "TIFF":
        for tag in (256, 257):
            at = content.index(struct.pack("<HHI", tag, 4, 1))
            content[at + 8 : at + 12] = struct.pack("<I", 9000)
    elif form == "BMP":
        content[18:26] = struct.pack("<ii", 9000, 9000)
    elif form == "GIF":
        content[6:10] = struct.pack("<HH", 9000, 9000)
    elif form == "WEBP":
        at = content.index(b"\x9d\x01\x2a") + 3
        content[at : at + 4] = struct.pack("<HH", 9000, 9000)
    else:
        at = content.index(b"ispe") + 8
        content[at : at + 8] = struct.pack(">II", 9000, 9000)
    path.write_bytes(content)
    with pytest.raises(HdbError, match=r"64 megapixels \(9000 x 9000 pixels\)"):
        read_photo(path)


@pytest.mark.parametrize("form", ["JPEG", "PNG", "TIFF", "HEIF", "AVIF", "GIF", "BMP", "WEBP"])
def test_damage_never_ends_in_a_traceback(
    tmp_path: Path, picture: np.ndarray, form: str, capfd: pytest.CaptureFixture[str]
) -> None:
    path = saved(tmp_path / "photo", Image.fromarray(picture[:64, :64]), form)
    content, draw = path.read_bytes(), np.random.default_rng(0)
    refused = 0
    for i in range(40):
        broken = bytearray(content[: len(content) * (i + 1) // 41] if i < 20 else content)
        if i >= 20:
            for at in draw.integers(0, min(len(content), 10 ** draw.integers(2, 5)), 3):
                broken[at] = draw.integers(256)
        path.write_bytes(broken)
        try:
            assert read_photo(path).dtype == np.uint8
        except HdbError as error:
            refused += 1
            assert "\n" not in str(error)
    assert refused >= 20
    assert not capfd.readouterr().err


def every_kind(folder: Path, image: Image.Image) -> dict[str, Path]:
    """Save a photo in every format at its best, from the spaces of three profiles and in inks; and
    the numbers of two without their profile, for controls."""
    paths = {"png": saved(folder / "photo.png", image, "PNG")}
    for form in ("jpeg", "webp", "heic", "avif", "tiff", "mpo", "apng", "moving webp"):
        kind, options, _ = FORMATS[form]
        paths[form] = saved(folder / form, image, kind, **options)
    for form in ("bmp", "ppm"):
        paths[form] = saved(folder / form, image, PLAIN[form][0])
    paths["jpeg 2000"] = saved(folder / "photo.jp2", image, "JPEG2000")
    picture = np.asarray(image)
    paths["16 bits"] = png_with(folder / "deep.png", picture.astype(np.uint16) * 257)
    for space in SPACES:
        profile = rgb_profile(space)
        moved = in_space(picture, profile)
        paths[space] = saved(folder / f"{space}.png", moved, "PNG", icc_profile=profile)
    bare = in_space(picture, rgb_profile("ProPhoto"))
    paths["ProPhoto, bare"] = saved(folder / "bare.png", bare, "PNG")
    inks = in_inks(picture)
    paths["print"] = saved(folder / "print.tif", inks, "TIFF", icc_profile=cmyk_profile())
    paths["print, bare"] = saved(folder / "bare.tif", inks, "TIFF")
    return paths


def test_a_face_has_one_likeness_in_every_format_and_profile(
    tmp_path: Path, astronaut: Path
) -> None:
    """A portrait is as alike as to the PNG within 0.01: here the face itself, flat and mirrored,
    stands for one."""
    image = Image.open(astronaut).convert("RGB").crop((96, 0, 352, 256))
    template = np.array(TEMPLATE)
    paths = every_kind(tmp_path, image)
    crops = {name: crop_face(path, template, 128).image for name, path in paths.items()}
    portrait = np.ascontiguousarray(crops["png"][:, ::-1]) // 2 + 64
    stacked = torch.from_numpy(np.stack([portrait, *crops.values()])).permute(0, 3, 1, 2)
    drawn, *photos = load_dlib().embed_aligned(stacked.float() / 127.5 - 1, template)
    alike = {name: likeness(drawn, photo) for name, photo in zip(crops, photos, strict=True)}
    controls = [alike.pop(name) for name in list(alike) if "bare" in name]
    assert alike["png"] > 0.5
    assert max(abs(each - alike["png"]) for each in alike.values()) < 0.01, alike
    assert min(abs(each - alike["png"]) for each in controls) > 0.01, controls


@pytest.mark.slow  # the test before this one sees the same faces, without drawing any
def test_hdb_new_makes_one_person_of_every_format_and_profile(
    tmp_path: Path,
    astronaut: Path,
    tiny: Base,
    usual_sampling_steps: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of a prediction: its numbers, and its likeness on as many portraits as `hdb new` draws, in
    all their steps.

    A GIF has 256 colours, so it is another photo: as alike as a PNG of the same pixels.
    """

    # The other tests draw one.
    monkeypatch.setattr("hdbcli.training.personalise.LIKENESS_SEEDS", (1, 2, 3, 4))

    def made(photo: str | Path) -> Identity:
        return api.new(photo, base=tiny, refine=False).identity

    image = Image.open(astronaut).convert("RGB")
    paths = every_kind(tmp_path, image)
    found = {name: made(path) for name, path in paths.items()}
    with paths["png"].open("rb") as file, monkeypatch.context() as patch:
        patch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(file.read())))
        found["standard input"] = made("-")
    png = found["png"]
    apart = {name: float((each.up - png.up).norm() / png.up.norm()) for name, each in found.items()}
    # Predictions depend on colours little, and likeness less: whose numbers are no control.
    controls = {name: apart.pop(name) for name in list(apart) if "bare" in name}
    assert len(apart) == 14 + len(SPACES) + 1, apart
    assert max(apart.values()) < min(controls.values()), (apart, controls)
    assert apart["ProPhoto"] < 0.2 * controls["ProPhoto, bare"]
    alike = {name: float(found[name].facts.likeness or 0) for name in apart}
    assert max(abs(each - alike["png"]) for each in alike.values()) < 0.01 < alike["png"], alike

    few = saved(tmp_path / "photo.gif", image, "GIF")
    same = saved(tmp_path / "few.png", Image.open(few).convert("RGB"), "PNG")
    assert made(few).facts.likeness == made(same).facts.likeness
