"""Merge an identity into its base model: a full checkpoint that needs no hdb."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

from hdbcli.base import Base
from hdbcli.errors import HdbError
from hdbcli.inject import eject
from hdbcli.lidb import Theta


def check_folder(out: Path, force: bool) -> None:
    """Raise HdbError now if the merged model could not be written to `out`."""
    if out.exists() and not out.is_dir():
        raise HdbError(f"{out} is a file; give a folder")
    if out.exists() and any(out.iterdir()):
        if not force:
            raise HdbError(
                f"{out} is not empty; give another folder, or --force to replace a model"
            )
        if not (out / "model_index.json").exists():
            raise HdbError(
                f"{out} holds no model, so --force does not replace it; give another folder"
            )
    parent = out.absolute().parent
    try:
        parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=parent).close()
    except OSError as error:
        raise HdbError(
            f"{parent} cannot be written to ({error.strerror}); give another --out"
        ) from None


def merge(base: Base, theta: Theta, out: Path) -> int:
    """Write the base with `theta` (of one identity) fused into it as a diffusers folder; return
    its bytes.

    W + dW is taken in float32 and cast once. The base in memory is used up: it wears the identity
    for good. The folder is written beside and renamed, so that an interrupted merge leaves nothing.
    """
    base.injected.wear(theta)
    eject(base.backbone.components, fuse=True)
    out = out.absolute()
    beside = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    try:
        base.backbone.save(beside)
        beside.chmod(0o755)
        if out.exists():
            shutil.rmtree(out)
        os.replace(beside, out)
    except OSError as error:
        raise HdbError(
            f"{out} could not be written ({error.strerror}); free space or go elsewhere"
        ) from error
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    return sum(file.stat().st_size for file in out.rglob("*") if file.is_file())
