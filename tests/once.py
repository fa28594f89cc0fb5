"""Work that takes long and always comes out the same, done once in a process of tests: the faces
of a picture, the basis of a target, the command line read from its functions, and the files of
`tiny`, of which each who loads them gets a copy of their own.

Tests of these things themselves, by their folders, do them each time.
"""

from __future__ import annotations

import copy
import functools
import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    import numpy as np

    from hdbcli.faces.photo import Face

EACH_TIME = ("tests/faces", "tests/method", "tests/registry", "tests/bench")
BASES = 400  # sides of targets: those of `tiny`, and of a narrow base beside it


def _each_time() -> bool:
    return os.environ.get("PYTEST_CURRENT_TEST", "").startswith(EACH_TIME)


@contextmanager
def done_once() -> Iterator[None]:
    """Remember inside the block what was found, computed and loaded."""
    from typer import testing

    from hdbcli.faces import photo
    from hdbcli.method import basis
    from registry.stable_diffusion import loading
    from registry.tiny import WEIGHTS

    find, side, load = photo.find_faces, basis._side, loading.load_folder
    side_once = functools.lru_cache(BASES)(side)
    found: dict[bytes, list[Face]] = {}
    loaded: dict[tuple[str, str], Any] = {}

    def find_faces(rgb: np.ndarray) -> list[Face]:
        if _each_time():
            return find(rgb)
        key = hashlib.sha256(repr(rgb.shape).encode() + rgb.tobytes()).digest()
        if key not in found:
            found[key] = find(rgb)
        return list(found[key])

    def load_folder(folder: Path, device: str, dtype: str, double: bool = False) -> Any:
        if folder != WEIGHTS or _each_time():
            return load(folder, device, dtype, double)
        if (device, dtype) not in loaded:
            loaded[device, dtype] = load(folder, device, dtype, double)
        kept = loaded[device, dtype]
        return replace(kept, pipeline=copy.deepcopy(kept.pipeline))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(photo, "find_faces", find_faces)
        patch.setattr(basis, "_side", lambda *of: (side if _each_time() else side_once)(*of))
        patch.setattr(loading, "load_folder", load_folder)
        patch.setattr(testing, "_get_command", functools.cache(testing._get_command))
        yield
