"""Write small ICC profiles (ICC.1:2010) and take pictures into their spaces, for tests."""

from __future__ import annotations

import io
import struct

import numpy as np
from PIL import Image, ImageCms

# x and y of red, green, blue and of white (D65, and D50 for ProPhoto), and the exponent; 0: sRGB's.
SPACES = {
    "sRGB": ((0.64, 0.33), (0.30, 0.60), (0.15, 0.06), (0.3127, 0.3290), 0.0),
    "Display P3": ((0.680, 0.320), (0.265, 0.690), (0.150, 0.060), (0.3127, 0.3290), 0.0),
    "Adobe RGB": ((0.64, 0.33), (0.21, 0.71), (0.15, 0.06), (0.3127, 0.3290), 563 / 256),
    "ProPhoto": (
        (0.734699, 0.265301),
        (0.159597, 0.840403),
        (0.036598, 0.000105),
        (0.3457, 0.3585),
        1.8,
    ),
}
D50 = np.array([0.9642, 1.0, 0.8249])
BRADFORD = np.array(
    [[0.8951, 0.2664, -0.1614], [-0.7502, 1.7135, 0.0367], [0.0389, -0.0685, 1.0296]]
)


def rgb_profile(space: str) -> bytes:
    """Build a matrix profile of version 4."""
    *points, white, exponent = SPACES[space]
    xyz = np.array([[x / y, 1, (1 - x - y) / y] for x, y in (*points, white)])
    columns = xyz[:3].T * np.linalg.solve(xyz[:3].T, xyz[3])
    adapt = np.linalg.inv(BRADFORD) @ np.diag(BRADFORD @ D50 / (BRADFORD @ xyz[3])) @ BRADFORD
    tags = {
        name: _xyz(column)
        for name, column in zip((b"rXYZ", b"gXYZ", b"bXYZ"), (adapt @ columns).T, strict=True)
    }
    return _profile(
        b"RGB ", b"XYZ ", tags | dict.fromkeys((b"rTRC", b"gTRC", b"bTRC"), _curve(exponent))
    )


def grey_profile(exponent: float) -> bytes:
    return _profile(b"GRAY", b"XYZ ", {b"kTRC": _curve(exponent)})


def cmyk_profile(nodes: int = 9) -> bytes:
    """Build a table of Lab over inks whose black is a dark grey, as in print."""
    axis = np.linspace(0, 1, nodes)
    c, m, y, k = np.meshgrid(axis, axis, axis, axis, indexing="ij")
    light = np.stack([(1 - 0.92 * ink) * (1 - 0.9 * k) for ink in (c, m, y)], axis=-1)
    lab = Image.fromarray(np.rint(light.reshape(1, -1, 3) * 255).astype(np.uint8))
    to_lab = ImageCms.buildTransform(
        ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), "RGB", "LAB", 1
    )
    table = np.array(ImageCms.applyTransform(lab, to_lab)) ^ np.array([0, 128, 128], np.uint8)
    identity = bytes(range(256))
    matrix = struct.pack(">9i", *(65536 * np.eye(3, dtype=int)).ravel())
    head = b"mft1" + bytes(4) + bytes([4, 3, nodes, 0])
    return _profile(
        b"CMYK",
        b"Lab ",
        {b"A2B0": head + matrix + 4 * identity + table.tobytes() + 3 * identity},
        version=2,
    )


def _curve(exponent: float) -> bytes:
    if exponent:
        return b"para" + struct.pack(">IHHi", 0, 0, 0, round(exponent * 65536))
    values = (2.4, 1 / 1.055, 0.055 / 1.055, 1 / 12.92, 0.04045)
    return b"para" + struct.pack(">IHH5i", 0, 3, 0, *(round(v * 65536) for v in values))


def _xyz(values: np.ndarray) -> bytes:
    return b"XYZ " + struct.pack(">I3i", 0, *(round(float(v) * 65536) for v in values))


def _profile(space: bytes, pcs: bytes, tags: dict[bytes, bytes], version: int = 4) -> bytes:
    kind = b"prtr" if space == b"CMYK" else b"mntr"
    text = "test".encode("utf-16-be")
    words = (
        b"mluc"
        + struct.pack(">4I", 0, 1, 12, 0x656E5553)
        + struct.pack(">II", len(text), 28)
        + text
    )
    if version == 2:
        words = b"desc" + struct.pack(">II", 0, 5) + b"test\0" + bytes(78)
    tags = {
        b"desc": words,
        b"cprt": words if version == 4 else b"text\0\0\0\0none\0",
        b"wtpt": _xyz(D50),
    } | tags
    table, body = b"", b""
    for name, content in tags.items():
        table += name + struct.pack(">II", 132 + 12 * len(tags) + len(body), len(content))
        body += content + bytes(-len(content) % 4)
    size = 132 + len(table) + len(body)
    head = struct.pack(">I4sI4s4s4s", size, b"test", version << 24, kind, space, pcs) + struct.pack(
        ">6H", 2026, 1, 1, 0, 0, 0
    )
    head += b"acsp" + bytes(28) + struct.pack(">3i", *(round(float(v) * 65536) for v in D50))
    return head.ljust(128, b"\0") + struct.pack(">I", len(tags)) + table + body


def in_space(picture: np.ndarray, profile: bytes, mode: str = "RGB") -> Image.Image:
    """Bring sRGB pixels into the space of a profile with numbers of its own; out of gamut clips."""
    source, goal = ImageCms.createProfile("sRGB"), ImageCms.ImageCmsProfile(io.BytesIO(profile))
    transform = ImageCms.buildTransform(
        source, goal, "RGB", mode, ImageCms.Intent.RELATIVE_COLORIMETRIC
    )
    moved = ImageCms.applyTransform(Image.fromarray(picture), transform)
    assert moved is not None
    moved.info.clear()  # which a saved file would carry
    return moved
