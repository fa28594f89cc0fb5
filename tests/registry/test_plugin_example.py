"""A third-party package adds a family that hdb does not know, and the commands work on it."""

from __future__ import annotations

import errno
import json
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import hdb, ok, refused
from hatchling.builders.wheel import WheelBuilder
from identities import describe
from PIL import Image
from safetensors.torch import load_file

from hdbcli import doctor
from hdbcli.identity.file import load, save, theta_for
from hdbcli.model.base import Base, load_base
from registry import store
from registry.plugins import load_registry

EXAMPLE = Path(__file__).parents[1] / "plugin_example"


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the package's wheel and unpack it, which is all that installing one of Python does."""
    folder = tmp_path_factory.mktemp("site")
    (wheel,) = WheelBuilder(str(EXAMPLE)).build(directory=str(folder), versions=["standard"])
    with zipfile.ZipFile(wheel) as file:
        file.extractall(folder)
    return folder


@pytest.fixture
def installed(site: Path, hdb_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(site))
    for name in [name for name in sys.modules if name.partition(".")[0] == "hdb_example"]:
        monkeypatch.delitem(sys.modules, name)


def test_it_is_found_only_where_it_is_installed(
    site: Path, hdb_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert not [path for path in EXAMPLE.rglob("*.py") if "hdbcli" in path.read_text()]
    assert "example" not in load_registry().names()
    monkeypatch.syspath_prepend(str(site))
    found = load_registry()
    assert found.problems == [] and found.get("example").family == "example-dit"
    assert found.source("example") == "hdb_example:register (hdb-example 0.1.0)"
    assert "example  " in ok("base", "list").stdout
    (seen,) = [check for check in doctor.bases(found) if check.name == "example"]
    assert seen.state == doctor.OK and "without a hypernetwork" in seen.found
    assert json.loads(ok("base", "show", "example", "--json").stdout)["hypernetwork"] is False


def test_from_photo_to_pictures(installed: None, astronaut: Path, tmp_path: Path) -> None:
    made = ok("new", astronaut, "eve", "--base", "example", "--steps", 3, "--json")
    values = json.loads(made.stdout)
    assert "starts from scratch" in made.stderr
    assert values["base"] == "example" and values["rank"] == 4 and values["bytes"] <= 20_000
    assert values["loss"]["end"] < values["loss"]["start"]
    words = ["a [V] face", "-n", 2, "--seed", 1, "--steps", 3]
    for folder, more in (("a", ()), ("b", ()), ("plain", ("--strength", 0))):
        ok("gen", "eve", *words, "-o", tmp_path / folder, *more)
    a, b, plain = (read(tmp_path / folder / "eve-a-v-face-2.png") for folder in ("a", "b", "plain"))
    assert a.shape == (32, 32, 3) and (a == b).all() and (a != plain).any()


def test_the_other_commands(installed: None, astronaut: Path, tmp_path: Path) -> None:
    ok("new", astronaut, "eve", "--base", "example", "--steps", 3)
    ok("refine", "eve", astronaut, "--steps", 2)
    ok("cp", "eve", "adam")
    ok("compose", "eve=0.5", "adam=0.5", "--as", "same", "--dtype", "fp32")
    out = tmp_path / "out"
    words = ["a [V] face", "-n", 1, "--seed", 1, "--steps", 3, "-o", out]
    ok("gen", "eve,same", *words)
    difference = np.abs(read(out / "eve-a-v-face-1.png") - read(out / "same-a-v-face-1.png"))
    assert difference.max() <= 2  # the file of eve is rounded, that of the sum is not
    ok("inspect", "eve")
    assert json.loads(ok("verify", "--json").stdout)["identities"][0]["basis"] is True
    ok("export", "eve", "-o", tmp_path / "lora.safetensors")
    assert "lora_denoiser_blocks_0_query.alpha" in load_file(tmp_path / "lora.safetensors")
    ok("gen", "adam", *words, "--lora", tmp_path / "lora.safetensors")
    for more, says in (
        (("--scheduler", "ddim"), "not a scheduler of this model"),
        (("--size", 30), "multiple of 4"),
    ):
        result = hdb("gen", "eve", *words, *more)
        assert result.exit_code == 1 and says in result.stderr


def test_merging_copies_it(
    installed: None, astronaut: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ok("new", astronaut, "eve", "--base", "example", "--steps", 3)
    merged = tmp_path / "merged"
    ok("merge", "eve", "--out", merged)
    base = load_base(load_registry().get("example"), "cpu")
    theta, _ = theta_for(base, load(store.path_of("eve")))
    weights = {
        part: load_file(merged / part / "model.safetensors") for part in ("denoiser", "words")
    }
    with base.injected.adapted(theta):
        for name, layer in base.injected.layers.items():
            part, _, path = name.partition(".")
            expected = layer.base.weight + layer.delta()
            torch.testing.assert_close(weights[part][f"{path}.weight"], expected)
    assert json.loads((merged / "model_index.json").read_text()).keys() > weights.keys()
    monkeypatch.setattr(type(base.backbone), "save", lambda self, folder: None)
    result = hdb("merge", "eve", "--out", tmp_path / "none")
    assert result.exit_code == 1 and "no model_index.json" in result.stderr

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")  # as a write says it: of no file

    monkeypatch.setattr(type(base.backbone), "save", full)
    says = f"could not be unpacked in {tmp_path} ([Errno 28] No space left on device); free space"
    refused("merge", "eve", "--out", tmp_path / "none", says=says)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hdb-home", "merged"]


def test_identities_of_another_family_are_refused(installed: None, tiny: Base) -> None:
    theta = tiny.first_theta()
    save(describe(tiny, theta, ""), store.path_of("tim"), "fp16")
    result = hdb("gen", "tim", "a [V] face", "--base", "example")
    assert result.exit_code == 1 and "family" in result.stderr
    ok("gen", "tim", "a [V] face", "-n", 1, "--steps", 1, "-o", store.root())  # the control


def read(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path)).astype(int)
