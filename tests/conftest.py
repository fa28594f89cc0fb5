"""Fixtures and surroundings of the tests: no network, no user's store, few threads."""

from __future__ import annotations

import functools
import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from hdbcli.limits import cpus, set_threads
from registry.spec import BaseSpec, SampleSettings

if TYPE_CHECKING:
    from cutdown import Narrow

    from hdbcli.model.base import Base

# Set before anything imports torch or a hub client, and inherited by the commands that tests start.
_STORE = tempfile.TemporaryDirectory(prefix="hdb-tests-")
os.environ["HDB_HOME"] = _STORE.name  # a test that forgets `hdb_home` still spares the user's store
os.environ["HF_HUB_OFFLINE"] = "1"
# The nets are small: more threads only wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", str(min(4, cpus())))
set_threads()

_USUAL_SAMPLING: Any = BaseSpec.sampling


@pytest.fixture(autouse=True)
def elsewhere(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Work in an empty folder: commands write pictures where they are called."""
    monkeypatch.chdir(tmp_path_factory.mktemp("here"))


@pytest.fixture
def keep_freed_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Quantise without telling glibc to give back what is freed from here on, which would slow all
    later tests of the process."""
    for module in ("base", "quantise"):
        monkeypatch.setattr(f"hdbcli.model.{module}.give_back_memory", lambda: None)


@pytest.fixture
def float32_weights(monkeypatch: pytest.MonkeyPatch, keep_freed_memory: None) -> None:
    """Load `tiny` in float32, whatever a memory plan says: processors that do not multiply in
    bfloat16 take some fifteen times as long for it."""
    import registry.tiny

    load = registry.tiny.load
    monkeypatch.setattr(registry.tiny, "load", lambda device, _: load(device, "float32"))


@pytest.fixture
def few_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Evaluate hypernetworks on 8 pairs of noise and time, where 32 are usual."""
    from hdbcli.training import evaluate

    monkeypatch.setattr(evaluate, "person_losses", partial(evaluate.person_losses, pairs=8))


@pytest.fixture
def hdb_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Give the test an empty store of its own; return its folder, which does not exist yet."""
    home = tmp_path / "hdb-home"
    monkeypatch.setenv("HDB_HOME", str(home))
    return home


@pytest.fixture(scope="session")
def astronaut() -> Path:
    """Return the path of the shipped real photo, NASA's portrait of Eileen Collins."""
    return Path(__file__).parent / "data" / "astronaut.png"


@functools.cache
def _why_no_egl() -> str | None:
    """Return why nothing can be drawn through EGL here, or None if it can."""
    try:
        import moderngl

        moderngl.create_context(standalone=True, backend="egl").release()
    except Exception as error:  # the binding raises Exception itself, or OSError
        return f"EGL is missing (Debian: libegl1 libgl1-mesa-dri libgl1): {error}"
    return None


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip a test marked `egl`, saying why, where EGL is missing."""
    if item.get_closest_marker("egl") and (why := _why_no_egl()):
        pytest.skip(why)


@pytest.fixture(scope="session", autouse=True)
def two_sampling_steps() -> Iterator[None]:
    """Draw in 2 steps by default, where 25 are usual: few tests look at what a picture shows, and
    those say how many steps that takes."""

    def sampling(spec: BaseSpec) -> SampleSettings:
        usual = _USUAL_SAMPLING.fget(spec)
        return usual if spec.few_steps else replace(usual, steps=2)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(BaseSpec, "sampling", property(sampling))
        # DreamBooth draws pictures of its class, whatever the base's default.
        patch.setattr("hdbcli.compare.baselines.SampleSettings", partial(SampleSettings, steps=2))
        yield


@pytest.fixture(scope="session", autouse=True)
def little_is_measured_of_new_identities() -> Iterator[None]:
    """Measure what refinement gained on 2 pairs of noise and time a sample, where 8 are usual, and
    likeness on one portrait, where `tiny` takes two."""
    from hdbcli.training import personalise, refine

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(refine, "PAIRS", 4)
        patch.setattr(personalise, "LIKENESS_SEEDS", (1,))
        yield


@pytest.fixture(scope="session", autouse=True)
def what_takes_long_is_done_once() -> Iterator[None]:
    from once import done_once

    with done_once():
        yield


@pytest.fixture
def usual_sampling_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Draw by default as users do."""
    monkeypatch.setattr(BaseSpec, "sampling", _USUAL_SAMPLING)


@pytest.fixture(scope="session")
def tiny() -> Base:
    """Load the shipped base once; tests leave it without an adapter."""
    from hdbcli.model.base import load_base
    from registry.plugins import load_registry

    return load_base(load_registry().get("tiny"), "cpu")


@pytest.fixture(scope="session")
def _narrow(tmp_path_factory: pytest.TempPathFactory) -> Narrow:
    from cutdown import Narrow

    return Narrow(tmp_path_factory.mktemp("narrow"))


@pytest.fixture
def narrow(_narrow: Narrow, monkeypatch: pytest.MonkeyPatch) -> Narrow:
    """Give the test cut-down checkpoints, and let single files be read as narrow as they are."""
    monkeypatch.setattr("registry.stable_diffusion.families.CONFIGS", _narrow.configs)
    return _narrow


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory, astronaut: Path) -> Path:
    """Make one identity for all tests; return its file."""
    from commands import QUICK, ok

    from registry import store

    home = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HDB_HOME", str(home))
        ok("new", astronaut, "alice", "--no-preview", *QUICK)
        return store.path_of("alice")


@pytest.fixture
def alice(made: Path, hdb_home: Path) -> Path:
    """Put that identity into a store of the test's own."""
    from registry import store

    path = store.path_of("alice")
    path.parent.mkdir(parents=True)
    shutil.copy(made, path)
    return path
