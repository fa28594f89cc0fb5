"""Base models are found through one door; a broken or doubled one is told and never fatal."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from registry.errors import HdbError
from registry.plugins import Registry, load_metrics, load_registry
from registry.spec import BaseSpec

ROOT = Path(__file__).resolve().parents[2]
POINTS = ((0.3, 0.4), (0.7, 0.4), (0.5, 0.6), (0.35, 0.8), (0.65, 0.8))

MODULE = """
from registry.spec import BaseSpec

def load(device, dtype):
    raise AssertionError("a list must load nothing")

def register(register):
    for name in {names!r}:
        register(BaseSpec(name, "fam", "a summary", "MIT", {{"unet": ("to_q",)}}, 4, 2, 7, "sks",
                          64, {points!r}, None, load))
    {end}
"""

Install = Callable[..., None]


def spec(**changes: Any) -> BaseSpec:
    """Return a good spec with changes."""
    good: dict[str, Any] = {
        "name": "good",
        "family": "sd1",
        "summary": "for tests",
        "licence": "MIT",
        "targets": {"unet": (r".*to_[qkv]",), "text_encoder": ()},
        "a": 4,
        "b": 2,
        "basis_seed": 0,
        "identifier": "sks",
        "resolution": 64,
        "template": POINTS,
        "hypernetwork": None,
        "load": lambda device, dtype: None,
    }
    return BaseSpec(**{**good, **changes})


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Install:
    """Install real distributions in a folder on sys.path; the built-in one is always `first`."""
    site = tmp_path / "site"
    site.mkdir()
    monkeypatch.syspath_prepend(str(site))
    monkeypatch.delenv("HDB_PLUGINS", raising=False)
    monkeypatch.delenv("HDB_DEBUG", raising=False)

    def add(
        name: str,
        models: tuple[str, ...] = (),
        end: str = "",
        head: str = "",
        metadata: bool = True,
    ) -> None:
        module = f"plug_{tmp_path.name}_{name}".replace("-", "_")
        code = head + MODULE.format(names=models, points=POINTS, end=end or "pass")
        (site / f"{module}.py").write_text(code)
        info = site / f"{name.replace('-', '_')}-1.5.dist-info"
        info.mkdir()
        if metadata:
            (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.5\n")
        (info / "entry_points.txt").write_text(f"[hdb.models]\n{name} = {module}:register\n")
        monkeypatch.delitem(sys.modules, module, raising=False)

    add("hyperdreambooth", ("first",))  # hides the installed one
    return add


def test_built_ins_and_plugins_come_through_one_door(install: Install) -> None:
    install("acme", ("acme-xl", "Acme-15"))
    found = load_registry()
    assert found.names() == ["Acme-15", "acme-xl", "first"]
    assert [one.name for one in found.specs()] == found.names()
    assert found.problems == []
    assert found.get("ACME-XL").name == "acme-xl"  # no case
    assert "acme" in found.source("acme-xl") and "1.5" in found.source("acme-xl")


def test_unknown_name_tells_choices_and_the_likely_one(install: Install) -> None:
    install("acme", ("stable-diffusion",))
    found = load_registry()
    with pytest.raises(HdbError) as caught:
        found.get("stable-difusion")
    text = str(caught.value)
    assert "did you mean 'stable-diffusion'?" in text and "first" in text
    with pytest.raises(HdbError) as caught:
        found.get("zzz")
    assert "did you mean" not in str(caught.value) and "stable-diffusion" in str(caught.value)
    with pytest.raises(HdbError, match="none is installed"):
        Registry(BaseSpec).get("first")


@pytest.mark.parametrize(
    ("how", "error", "says"),
    [
        ({"head": "import no_such_module_at_all\n"}, ModuleNotFoundError, "no_such_module_at_all"),
        ({"head": "def broken(:\n"}, SyntaxError, "SyntaxError"),
        ({"end": "raise ValueError('two\\nlines')"}, ValueError, "ValueError: two lines"),
        ({"end": "raise SystemExit(3)"}, SystemExit, "SystemExit: 3"),
        ({"end": "register('a string')"}, HdbError, "str, not a BaseSpec"),
        ({"models": ("bad name",)}, HdbError, "'bad name'"),
    ],
    ids=["import", "syntax", "raises", "exits", "no spec", "bad spec"],
)
def test_a_broken_plugin_is_told_and_never_fatal(
    install: Install,
    monkeypatch: pytest.MonkeyPatch,
    how: dict[str, Any],
    error: type[BaseException],
    says: str,
) -> None:
    install("broken", **how)
    install("works", ("works",))
    found = load_registry()
    assert found.names() == ["first", "works"]
    (problem,) = found.problems
    assert says in problem and "(broken 1.5)" in problem and "\n" not in problem
    with pytest.raises(HdbError, match="1 could not be loaded"):
        found.get("broken")
    monkeypatch.setenv("HDB_DEBUG", "1")
    with pytest.raises(error):
        load_registry()
    monkeypatch.setenv("HDB_PLUGINS", "works")  # the control: without the broken one it holds
    assert load_registry().problems == []


def test_a_distribution_without_metadata_is_a_third_party(
    install: Install, monkeypatch: pytest.MonkeyPatch
) -> None:
    install("nameless", ("odd",), metadata=False)
    assert load_registry().names() == ["first", "odd"]
    monkeypatch.setenv("HDB_PLUGINS", "")
    assert load_registry().names() == ["first"]


def test_duplicates_name_both_sources_and_the_first_stays(install: Install) -> None:
    install("aaa", ("FIRST", "mine"))  # sorts before the built-in, and must not win
    install("bbb", ("mine",))
    found = load_registry()
    assert found.names() == ["first", "mine"]
    assert "hyperdreambooth" in found.source("first") and "(aaa 1.5)" in found.source("mine")
    built_in, third = found.problems
    assert "'FIRST'" in built_in and "(aaa 1.5)" in built_in and "hyperdreambooth" in built_in
    assert "'mine'" in third and "(bbb 1.5)" in third and "(aaa 1.5)" in third


def test_hdb_plugins_narrows_third_parties_only(
    install: Install, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("aaa", "bbb", "ccc"):
        install(name, (f"model-{name}",))
    assert load_registry().names() == ["first", "model-aaa", "model-bbb", "model-ccc"]
    for value, wanted in {"": [], "bbb": ["bbb"], " aaa, ccc ,": ["aaa", "ccc"]}.items():
        monkeypatch.setenv("HDB_PLUGINS", value)
        found = load_registry()
        assert found.names() == ["first", *(f"model-{name}" for name in wanted)]
        assert found.problems == []
    monkeypatch.setenv("HDB_PLUGINS", "aaa,missing")
    found = load_registry()
    assert found.names() == ["first", "model-aaa"]
    assert len(found.problems) == 1 and "'missing'" in found.problems[0]


def test_a_choice_of_plugins_is_looked_up_in_every_group(
    install: Install, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install("draws", ("mine",))
    install("measures")
    points = tmp_path / "site" / "measures-1.5.dist-info" / "entry_points.txt"
    points.write_text(points.read_text().replace("hdb.models", "hdb.metrics"))
    monkeypatch.setenv("HDB_PLUGINS", "draws,measures")
    assert load_registry().names() == ["first", "mine"]
    assert load_registry().problems == [] == load_metrics().problems
    monkeypatch.setenv("HDB_PLUGINS", "missing")  # the control
    for found in (load_registry(), load_metrics()):
        (problem,) = found.problems
        assert "'missing'" in problem and "hdb.models or hdb.metrics" in problem


def test_a_good_spec_holds() -> None:
    assert spec().name == "good"
    assert replace(spec(), a=1).a == 1


@pytest.mark.parametrize(
    "change",
    [
        {"name": ""},
        {"name": "../x"},
        {"name": "a\n"},
        {"name": "x" * 65},
        {"name": None},
        {"family": " "},
        {"identifier": ""},
        {"a": 0},
        {"b": -1},
        {"a": 1.5},
        {"basis_seed": -1},
        {"resolution": 0},
        {"steps": 0},
        {"likeness": -1},
        {"likeness": float("nan")},
        {"likeness": "much"},
        {"targets": {}},
        {"targets": {"unet": ()}},
        {"targets": {"unet": "to_q"}},
        {"targets": {"unet": ("(to_q",)}},
        {"targets": {"unet": (7,)}},
        {"template": POINTS[:4]},
        {"template": (*POINTS[:4], (0.5, 1.1))},
        {"template": (*POINTS[:4], (0.5, float("nan")))},
        {"template": (0.1, 0.2, 0.3, 0.4, 0.5)},
        {"load": None},
    ],
    ids=str,
)
def test_a_bad_spec_is_refused_at_its_own_door(change: dict[str, Any]) -> None:
    with pytest.raises(HdbError):
        spec(**change)


def test_the_registry_needs_no_torch() -> None:
    heavy = "{'torch', 'numpy', 'diffusers', 'hdbcli'}"
    code = (
        "import sys, registry.spec, registry.plugins, registry.store\n"
        "import registry.checkpoints.safetensors\n"
        f"print(sorted({heavy} & set(sys.modules)), 'json' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.split("\n")[0] == "[] True"
