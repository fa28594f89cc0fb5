"""Photos: what is read and what is refused, which face is cut out, and where its points end up."""

from __future__ import annotations

import io
import os
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from hdbcli.faces import photo
from hdbcli.faces.photo import align, crop_face, find_faces, find_points, read_photo
from registry.errors import HdbError

# Eyes, nose and mouth in a tight crop, in YuNet's order.
TEMPLATE = np.array([[0.33, 0.42], [0.67, 0.42], [0.5, 0.62], [0.36, 0.78], [0.64, 0.78]])

MEMORY_PROBE = """
import resource, sys
from pathlib import Path
from registry.errors import HdbError
from hdbcli.faces.photo import read_photo
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
    print("read", read_photo(Path(sys.argv[1])).shape)
except HdbError as error:
    print("refused", error)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.fixture(scope="module")
def portrait(astronaut: Path) -> np.ndarray:
    return read_photo(astronaut)


def saved(path: Path, picture: np.ndarray | Image.Image, **options: object) -> Path:
    image = Image.fromarray(picture) if isinstance(picture, np.ndarray) else picture
    image.save(path, **options)
    return path


def encoded(form: str) -> bytes:
    buffer = io.BytesIO()
    Image.effect_noise((80, 60), 50).convert("RGB").save(buffer, form)
    return buffer.getvalue()


def png(width: int, height: int, rows: bytes) -> bytes:
    """Build an RGB PNG by hand; its header may promise more than its rows hold."""

    def chunk(name: bytes, data: bytes) -> bytes:
        named = name + data
        return struct.pack(">I", len(data)) + named + struct.pack(">I", zlib.crc32(named))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    data = chunk(b"IDAT", zlib.compress(rows))
    return b"\x89PNG\r\n\x1a\n" + header + data + chunk(b"IEND", b"")


def resized(picture: np.ndarray, scale: float) -> np.ndarray:
    filtering = cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC
    return cv2.resize(picture, None, fx=scale, fy=scale, interpolation=filtering)


def difference(a: np.ndarray, b: np.ndarray) -> float:
    return float(abs(a.astype(float) - b).mean())


BAD: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "is empty"),
    "text": (b"Dear diary, this is not a photo at all.\n", "no JPEG, PNG, WebP, HEIC"),
    "web page": (b"\n<!DOCTYPE html><html>", "is a web page.*save the photo itself"),
    "pdf": (b"%PDF-1.7 and more", "is a PDF"),
    "film": (b"\0\0\0\x18ftypisom\0\0\0\0isommp42", "is a video"),
    "raw": (b"II*\0\x10\0\0\0CR\2\0", "is a camera raw file"),
    "short heic": (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "damaged or cut short"),
    "short avif": (encoded("AVIF")[:900], "damaged or cut short"),
    "short tiff": (encoded("TIFF")[:900], "damaged or cut short"),
    "short gif": (encoded("GIF")[:900], "damaged or cut short"),
    "short bmp": (encoded("BMP")[:900], "damaged or cut short"),
    "short jpeg": (encoded("JPEG")[:900], "damaged or cut short"),
    "short png": (encoded("PNG")[:900], "damaged or cut short"),
    "short webp": (encoded("WEBP")[:900], "damaged or cut short"),
    "signature": (encoded("JPEG")[:20], "damaged or cut short"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_is_no_picture_is_refused_whatever_its_name(tmp_path: Path, case: str) -> None:
    content, reason = BAD[case]
    path = tmp_path / "photo.jpg"
    path.write_bytes(content)
    with pytest.raises(HdbError, match=reason) as caught:
        read_photo(path)
    assert "photo.jpg" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP"])
def test_pictures_are_read_whatever_their_name(tmp_path: Path, form: str) -> None:
    path = tmp_path / "photo.txt"
    path.write_bytes(encoded(form))
    picture = read_photo(path)
    assert picture.shape == (60, 80, 3)
    assert picture.dtype == np.uint8
    assert difference(picture, np.asarray(Image.open(path).convert("RGB"))) == 0


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    for name, reason in {"no.jpg": "no such file", "": "not a file", "a\0": "cannot be"}.items():
        with pytest.raises(HdbError, match=reason):
            read_photo(tmp_path / name)


def test_a_locked_file_is_refused(tmp_path: Path, portrait: np.ndarray) -> None:
    path = saved(tmp_path / "locked.png", portrait)
    assert read_photo(path).shape == (512, 512, 3)
    path.chmod(0)
    if os.access(path, os.R_OK):
        pytest.skip("this user may read every file (root)")
    with pytest.raises(HdbError, match="permission denied"):
        read_photo(path)


@pytest.mark.parametrize("side", [60_000, 9_000, 64])
def test_huge_pictures_are_refused_by_their_header(tmp_path: Path, side: int) -> None:
    pytest.importorskip("resource", reason="peak memory is only told on Unix")
    path = tmp_path / "bomb.png"
    path.write_bytes(png(side, side, bytes(64 * (1 + 3 * 64))))
    command = [sys.executable, "-c", MEMORY_PROBE, str(path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    answer, growth = done.stdout.splitlines()
    assert answer.startswith("refused" if side > 64 else "read (64, 64, 3)")
    assert ("64 megapixels" in answer) == (side > 64)
    assert int(growth) < 20_000  # KiB on Linux; decoded, the smaller one alone would be 243 MB


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(
    tmp_path: Path, portrait: np.ndarray, orientation: int
) -> None:
    undo = {1: 0, 2: 0, 3: 2, 4: 2, 5: 1, 6: 1, 7: -1, 8: -1}[orientation]  # quarters, to the left
    lying = np.rot90(portrait[:, ::-1] if orientation in {2, 4, 5, 7} else portrait, undo).copy()
    exif = Image.Exif()
    exif[0x0112] = orientation
    tagged = saved(tmp_path / "tagged.png", lying, exif=exif)
    plain = saved(tmp_path / "plain.png", lying)
    assert np.array_equal(read_photo(tagged), portrait)
    assert np.array_equal(read_photo(plain), portrait) == (orientation == 1)


def test_a_photo_on_its_side_gives_the_same_crop(tmp_path: Path, portrait: np.ndarray) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    lying = saved(tmp_path / "phone.jpg", np.rot90(portrait).copy(), exif=exif, quality=98)
    upright = crop_face(saved(tmp_path / "upright.png", portrait), TEMPLATE, 64).image
    assert difference(crop_face(lying, TEMPLATE, 64).image, upright) < 3
    assert difference(upright[:, ::-1], upright) > 10


def test_broken_exif_does_not_hide_whole_pixels(tmp_path: Path, portrait: np.ndarray) -> None:
    broken = saved(tmp_path / "broken.png", portrait, exif=b"Exif\0\0II*\0\xff\xff\xff\xff junk")
    assert np.array_equal(read_photo(broken), portrait)


def test_transparency_becomes_grey(tmp_path: Path) -> None:
    pixels = np.zeros((10, 20, 4), np.uint8)
    pixels[..., 0] = 200
    pixels[:, 10:, 3] = 255
    rgba = read_photo(saved(tmp_path / "rgba.png", pixels))
    assert (rgba[:, :10] == 128).all()
    assert (rgba[:, 10:] == [200, 0, 0]).all()
    palette = Image.fromarray(pixels[..., :3]).convert("P", palette=Image.Palette.ADAPTIVE)
    index = palette.getpixel((0, 0))
    assert (read_photo(saved(tmp_path / "p.png", palette)) == [200, 0, 0]).all()
    assert (read_photo(saved(tmp_path / "pt.png", palette, transparency=index)) == 128).all()


def test_every_kind_of_pixel_becomes_rgb(tmp_path: Path, portrait: np.ndarray) -> None:
    image = Image.fromarray(portrait)
    grey = np.asarray(image.convert("L"))
    for name, picture in {
        "l.png": image.convert("L"),
        "la.png": image.convert("LA"),
        "16.png": Image.fromarray(grey.astype(np.uint16) * 257),
    }.items():
        assert (read_photo(saved(tmp_path / name, picture)) == grey[..., None]).all(), name
    palette = image.convert("P", palette=Image.Palette.ADAPTIVE)
    few = read_photo(saved(tmp_path / "p.png", palette))
    assert difference(few, portrait) < 10 < difference(few[::-1], portrait)
    cmyk = read_photo(saved(tmp_path / "cmyk.jpg", image.convert("CMYK"), quality=95))
    assert difference(cmyk, portrait) < 10 < difference(255 - cmyk, portrait)
    assert (read_photo(saved(tmp_path / "1.png", image.convert("1"))) % 255 == 0).all()


def test_the_first_picture_of_several_is_read(tmp_path: Path, portrait: np.ndarray) -> None:
    """Phones store a second view in the same JPEG (MPO)."""
    second = Image.fromarray(255 - portrait)
    path = tmp_path / "phone.jpg"
    saved(path, portrait, format="MPO", save_all=True, append_images=[second], quality=95)
    assert difference(read_photo(path), portrait) < 5


def test_a_face_is_found_where_it_is(portrait: np.ndarray) -> None:
    (face,) = find_faces(portrait)
    # Read off the photo by eye: pupils, nose tip, mouth corners.
    truth = [[202, 102], [249, 103], [224, 127], [205, 143], [242, 143]]
    assert abs(face.landmarks - truth).max() < 9  # a tenth of the face
    x, y, w, h = face.box
    assert 0.7 <= face.score <= 1
    assert x < 202 and y < 102 and x + w > 242 and y + h > 143
    assert face.side == min(w, h)


VIEWS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "small render": lambda photo: resized(photo[64:184, 163:283], 64 / 120),
    "fills the frame": lambda photo: resized(photo[66:174, 180:270], 8),
    "large photo": lambda photo: resized(photo, 6),
    "far away": lambda photo: np.pad(photo, ((0, 3000), (3000, 0), (0, 0)), mode="edge"),
    "thin strip": lambda photo: photo[:, 150:290],
}


@pytest.mark.parametrize("view", VIEWS)
def test_one_face_is_found_at_any_size(portrait: np.ndarray, view: str) -> None:
    assert len(find_faces(VIEWS[view](portrait))) == 1
    nothing = portrait[300:, :120]  # flag and sleeve
    assert find_faces(np.ascontiguousarray(nothing)) == []


@pytest.mark.parametrize("degrees", [-30, 20, 30])
def test_the_points_follow_a_tilted_head(portrait: np.ndarray, degrees: float) -> None:
    matrix = cv2.getRotationMatrix2D((222, 120), degrees, 1)
    tilted = cv2.warpAffine(portrait, matrix, (512, 512), borderMode=cv2.BORDER_REPLICATE)
    upright = find_faces(portrait)[0]
    found = find_faces(tilted)[0].landmarks
    goal = upright.landmarks @ matrix[:, :2].T + matrix[:, 2]
    assert abs(found - goal).max() < 0.08 * upright.side
    before, after = ((p - p.mean(0)) @ [1, -1j] for p in (upright.landmarks, found))
    tilt = np.degrees(np.angle((before.conj() * after).sum()))
    assert abs(tilt - degrees) < 6  # the detector's own points are off by over half of it


def test_one_look_finds_the_points_of_a_crop(portrait: np.ndarray) -> None:
    """Of the whole face and of one half as large in a corner; noise has none."""
    crop = cv2.resize(portrait[:256, 96:352], (128, 128), interpolation=cv2.INTER_AREA)
    small = np.full_like(crop, 128)
    small[64:, 64:] = cv2.resize(crop, (64, 64), interpolation=cv2.INTER_AREA)
    points = find_points(crop)
    assert points is not None
    assert np.abs(points - find_faces(crop)[0].landmarks).max() < 4
    smaller = find_points(small)
    assert smaller is not None
    assert np.abs(smaller - (points / 2 + 64)).max() < 3
    noise = np.random.default_rng(0).integers(0, 255, (128, 128, 3), dtype=np.uint8)
    assert find_points(noise) is None


@pytest.mark.parametrize("size", [40, 100, 400])
def test_alignment_puts_the_points_on_the_template(size: int) -> None:
    points = (TEMPLATE - 0.5) @ np.array([[0.9, 0.35], [-0.35, 0.9]]) * 150 + [260, 190]
    ys, xs = np.mgrid[:400, :500] + 0.5
    for point, goal in zip(points, TEMPLATE * size, strict=True):
        near = np.exp(-((xs - point[0]) ** 2 + (ys - point[1]) ** 2) / 18) * 255
        photo = np.repeat(near.astype(np.uint8)[..., None], 3, axis=2)
        crop = align(photo, points, TEMPLATE, size)[..., 0].astype(float)
        rows, columns = np.mgrid[:size, :size] + 0.5
        centre = np.array([(crop * columns).sum(), (crop * rows).sum()]) / crop.sum()
        assert abs(centre - goal).max() < min(1, size / 100)
        assert abs(centre - goal[::-1]).max() > 1


def test_alignment_never_mirrors() -> None:
    """Nor does it divide by the extent of points that have none."""
    photo = np.zeros((100, 100, 3), np.uint8)
    photo[:, 50:] = 255
    straight = align(photo, TEMPLATE * 100, TEMPLATE, 50)
    mirrored = align(photo, TEMPLATE * [-100, 100] + [100, 0], TEMPLATE, 50)
    assert straight[25, 5, 0] < 50 < 200 < straight[25, 45, 0]
    assert not np.allclose(mirrored, straight[:, ::-1], atol=50)
    with pytest.raises(HdbError, match="five points"):
        align(photo, np.full((5, 2), 7.0), TEMPLATE, 50)


def test_shrinking_averages_instead_of_skipping() -> None:
    board = (np.indices((600, 600)).sum(0) % 2 * 255).astype(np.uint8)
    photo = np.repeat(board[..., None], 3, axis=2)
    crop = align(photo, TEMPLATE * 555 + 20, TEMPLATE, 50)
    assert crop.std() < 5 < 100 < photo[::11, ::11].std()
    assert abs(crop.mean() - 127.5) < 3


def test_outside_the_photo_its_border_goes_on() -> None:
    photo = np.full((60, 60, 3), 90, np.uint8)
    assert (align(photo, TEMPLATE * 60 + 30, TEMPLATE, 32) == 90).all()
    assert (align(photo, TEMPLATE * 60 + 900, TEMPLATE, 32) == 90).all()


def test_a_panorama_wider_than_opencv_maps_is_aligned(portrait: np.ndarray) -> None:
    points = find_faces(portrait)[0].landmarks
    wide = np.zeros((512, 40_000, 3), np.uint8)
    wide[:, 35_000:35_512] = portrait
    crop = align(wide, points + np.array([35_000, 0]), TEMPLATE, 64)
    assert np.array_equal(crop, align(portrait, points, TEMPLATE, 64))


def test_one_face_is_cropped_without_asking(astronaut: Path) -> None:
    crop = crop_face(astronaut, TEMPLATE, 64)
    assert crop.image.shape == (64, 64, 3)
    assert crop.image.dtype == np.uint8
    assert (crop.index, crop.count, crop.warnings) == (1, 1, ())
    assert np.array_equal(crop.image, crop_face(astronaut, TEMPLATE, 64, face=1).image)
    assert abs(find_faces(resized(crop.image, 4))[0].landmarks / 256 - TEMPLATE).max() < 0.12


def test_of_several_faces_the_user_picks(tmp_path: Path, portrait: np.ndarray) -> None:
    tinted = (portrait * [0.6, 1, 0.7]).astype(np.uint8)
    larger = resized(tinted, 1.5)  # the largest is on the right, and is still number 2
    left = np.pad(portrait, ((0, 256), (0, 0), (0, 0)), mode="edge")
    path = saved(tmp_path / "two.png", np.concatenate([left, larger], axis=1))
    listed = r"2 faces.*--face N: 1: .*left, \d+ px; 2: .*, \d+ px"
    with pytest.raises(HdbError, match=listed) as told:
        crop_face(path, TEMPLATE, 64)
    widths = [int(part.split(" px")[0]) for part in str(told.value).split(", ")[1:]]
    assert widths[0] < widths[1]
    for number in (1, 2):
        crop = crop_face(path, TEMPLATE, 64, face=number)
        red, green, _ = crop.image.mean((0, 1))
        assert (crop.index, crop.count) == (number, 2)
        assert (red > green) == (number == 1)
    for number in (0, 3, -1):
        with pytest.raises(HdbError, match=f"2 faces, not {number}; pick with --face N: 1: "):
            crop_face(path, TEMPLATE, 64, face=number)


def test_no_face_is_an_error(tmp_path: Path, portrait: np.ndarray) -> None:
    faceless = saved(tmp_path / "sleeve.png", np.ascontiguousarray(portrait[300:, :120]))
    for number in (None, 1):
        with pytest.raises(HdbError, match=r"no face found; use a photo"):
            crop_face(faceless, TEMPLATE, 64, face=number)


def test_small_faces_are_refused_or_doubted(tmp_path: Path, portrait: np.ndarray) -> None:
    tiny = saved(tmp_path / "tiny.png", resized(portrait, 0.4))
    with pytest.raises(HdbError, match=r"the face is 3\d px wide, at least 48"):
        crop_face(tiny, TEMPLATE, 64)
    small = saved(tmp_path / "small.png", resized(portrait, 0.65))
    assert "only 5" in crop_face(small, TEMPLATE, 128).warnings[0]
    assert crop_face(small, TEMPLATE, 32).warnings == ()  # nothing is missing at that size
    large = saved(tmp_path / "large.png", resized(portrait, 1.5))
    assert crop_face(large, TEMPLATE, 256).warnings == ()


@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_blur_is_doubted(tmp_path: Path, portrait: np.ndarray, scale: float) -> None:
    photo = resized(portrait, scale)
    blurred = cv2.GaussianBlur(photo, (0, 0), 2.5 * scale)
    dark = (portrait * 0.3).astype(np.uint8)
    told = [
        crop_face(saved(tmp_path / f"{i}.png", picture), TEMPLATE, 64).warnings
        for i, picture in enumerate([photo, dark, blurred])
    ]
    assert told[:2] == [(), ()]
    assert "very blurred" in told[2][0]


@pytest.mark.parametrize("quarters", [1, 2, 3])
def test_a_photo_that_lies_without_exif_is_turned(
    tmp_path: Path, portrait: np.ndarray, quarters: int
) -> None:
    upright = crop_face(saved(tmp_path / "up.png", portrait), TEMPLATE, 64)
    lying = np.rot90(portrait, -quarters).copy()  # clockwise
    crop = crop_face(saved(tmp_path / "lies.png", lying), TEMPLATE, 64)
    assert np.array_equal(crop.image, upright.image)
    where = ("on its right side", "upside down", "on its left side")[quarters - 1]
    assert upright.warnings == () and len(crop.warnings) == 1 and where in crop.warnings[0]


def test_a_far_larger_face_is_taken(tmp_path: Path, portrait: np.ndarray) -> None:
    """A poster behind a person is not a second person; `face` still picks it."""
    tinted = (portrait * [0.6, 1, 0.7]).astype(np.uint8)
    for scale, alone in ((2.6, True), (1.6, False)):
        large = resized(tinted, scale)
        poster = np.pad(portrait, ((0, len(large) - 512), (0, 0), (0, 0)), mode="edge")
        path = saved(tmp_path / "two.png", np.concatenate([poster, large], axis=1))
        if not alone:
            with pytest.raises(HdbError, match="2 faces; pick with --face N"):
                crop_face(path, TEMPLATE, 64)
            continue
        crop = crop_face(path, TEMPLATE, 64)
        assert (crop.index, crop.count) == (2, 2)
        assert "took number 2" in crop.warnings[0] and "--face N" in crop.warnings[0]
        assert np.array_equal(crop.image, crop_face(path, TEMPLATE, 64, face=2).image)
        other = crop_face(path, TEMPLATE, 64, face=1)
        assert other.index == 1 and not any("took" in each for each in other.warnings)
        assert difference(other.image, crop.image) > 10


@pytest.mark.parametrize("degrees", [0, 25, 35, 45, 60])
def test_the_nose_tells_how_far_a_head_is_turned(degrees: float) -> None:
    """Of a nose 0.6 eye distances before the eyes, turned: 0.6 tan(angle), however it is tilted."""
    yaw, roll = np.radians(degrees), 0.4
    flat = np.array([[-0.5, 0, 0], [0.5, 0, 0], [0, 0.5, 0.6], [-0.4, 1, 0], [0.4, 1, 0]])
    x = flat[:, 0] * np.cos(yaw) + flat[:, 2] * np.sin(yaw)
    tilt = np.array([[np.cos(roll), np.sin(roll)], [-np.sin(roll), np.cos(roll)]])
    # The nose's height has no part in it: only what lies along the line of the eyes.
    points = np.stack([x, flat[:, 1]], axis=1) @ tilt * 90 + 200
    assert abs(photo._nose_offset(points) - 0.6 * np.tan(yaw)) < 1e-9
    assert (photo._nose_offset(points) > photo._TURNED) == (degrees >= 45)


def test_a_very_dark_face_is_doubted(tmp_path: Path, portrait: np.ndarray) -> None:
    for level, told in ((0.3, False), (0.1, True)):
        dark = saved(tmp_path / "dark.png", (portrait * level).astype(np.uint8))
        warnings = crop_face(dark, TEMPLATE, 64).warnings
        assert any("very dark" in warning for warning in warnings) == told
