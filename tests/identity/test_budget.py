"""Every family's identity keeps within its bytes by default, and hdb new without a hypernetwork."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from commands import hdb, refused, told
from identities import describe, facts

from hdbcli.identity.file import Identity, dtype_within, file_bytes, load, rank_within, save
from registry import store
from registry.stable_diffusion.families import FAMILIES

if TYPE_CHECKING:
    from cutdown import Narrow


def identity(targets: int, a: int, b: int, rank: int) -> Identity:
    return Identity(
        facts(
            base="x" * 64,
            family="sdxl",
            scheme="shake256-qr-1",
            seed=20230713,
            probes=(0.123456789,) * 4,
            steps=400,
            lineage=("relaxed from rank 1 to 4",),
        ),
        torch.ones(targets, rank, a),
        torch.ones(targets, b, rank),
    )


@pytest.mark.parametrize("name", FAMILIES)
def test_three_choices_fit_each_family(name: str, tmp_path: Path) -> None:
    family = FAMILIES[name]
    shape = family.count, family.a, family.b
    for rank, dtype in ((1, "fp32"), (2, "fp16"), (4, "int8")):
        size = save(identity(*shape, rank), tmp_path / "x.safetensors", dtype)
        assert size <= file_bytes(*shape, rank, dtype) <= family.budget
        assert file_bytes(*shape, rank + 1, dtype) > family.budget  # and no higher one does
    assert rank_within(family.budget, *shape) == 4
    assert dtype_within(family.budget, *shape, 4) == "int8"
    assert dtype_within(family.budget, *shape, 2) == "fp16"
    assert dtype_within(family.budget, *shape, 9) == "fp16"  # asked for, so not made coarse too


def test_small_budgets_lower_the_rank() -> None:
    assert rank_within(120_000, 71, 64, 32) == 4 and dtype_within(120_000, 71, 64, 32, 4) == "fp16"
    assert rank_within(20_000, 71, 64, 32) == 2 and rank_within(1, 71, 64, 32) == 1


def ok(*words: object) -> tuple[Any, str]:
    result = hdb(*words, "--json")
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout), result.stderr


def test_new_without_a_hypernetwork(narrow: Narrow, hdb_home: Path, astronaut: Path) -> None:
    ok("base", "add", "mine", narrow.folder("sd1"))
    ok("base", "default", "mine")
    made, told = ok("new", astronaut, "alice", "--steps", 4)
    assert "mine has no hypernetwork" in told and "4 iterations" in told
    assert "hdb base set-hypernetwork mine FILE" in told
    assert made["base"] == "mine" and made["rank"] == 4 and made["dtype"] == "int8"
    assert made["numbers"] == 4 * 28_800 and made["bytes"] <= 120_000
    assert made["loss"]["end"] < made["loss"]["start"]
    shown, _ = ok("show", "alice")
    assert shown["steps"] == 4 and shown["hypernetwork"] == "" and shown["family"] == "sd1"
    refused = hdb("new", astronaut, "bob", "--no-refine")
    assert refused.exit_code == 1 and "there is no prediction" in refused.stderr
    assert not store.exists("bob")


def test_new_with_a_hypernetwork_is_fast_again(
    narrow: Narrow, hdb_home: Path, tmp_path: Path, astronaut: Path
) -> None:
    from hdbcli.model.base import open_base
    from hdbcli.model.hypernetwork_file import save_hypernetwork
    from hdbcli.training.hypernetwork import new_hypernetwork
    from hdbcli.training.personalise import settle

    ok("base", "add", "mine", narrow.folder("sd1"))
    slow = open_base("mine", "cpu")
    assert settle(slow, None, None, 0, "adamw").steps == 400
    assert settle(slow, 7, 1, 0, "adamw").steps == 7
    file = tmp_path / "h.safetensors"
    save_hypernetwork(new_hypernetwork(slow, 0), file)
    assert hdb("base", "set-hypernetwork", "mine", file).exit_code == 0
    fast = settle(open_base("mine", "cpu"), None, None, 0, "adamw")
    assert fast.steps == 40 and fast.lr < settle(slow, None, None, 0, "adamw").lr
    file.unlink()
    gone = hdb("new", astronaut, "x", "--base", "mine", "--steps", 1)
    assert gone.exit_code == 1 and "no hypernetwork at" in gone.stderr


def test_an_identity_of_xl(narrow: Narrow, hdb_home: Path, tmp_path: Path) -> None:
    from hdbcli.method.lidb import Theta
    from hdbcli.model.base import open_base
    from hdbcli.training.personalise import settle

    ok("base", "add", "xl", shutil.copy(narrow.single("sdxl"), tmp_path / "xl.safetensors"))
    base = open_base("xl", "cpu")
    settings = settle(base, 1, None, 0, "adamw")
    assert settings.rank == 4
    first = base.first_theta(settings.rank)
    up = torch.randn(first.up.shape, generator=torch.Generator().manual_seed(0))
    made = describe(base, Theta(first.down, 0.1 * up), hypernetwork="")
    size = save(made, store.path_of("alice"), "int8")
    assert made.numbers == 4 * 120_900 and 120_000 < size <= base.spec.budget == 500_000
    words = ["gen", "alice", "a [V] face", "-n", 1, "--steps", 2, "--seed", 1, "-o", tmp_path]
    drawn, told = ok(*words)
    bare, _ = ok(*words, "--strength", 0)
    files = [Path(each["pictures"][0]["path"]).read_bytes() for each in (drawn, bare)]
    assert files[0] != files[1]
    assert told.startswith("memory: ") and told.count("\n") == 1  # and no warning


def test_an_identity_with_convolutions_is_made_and_drawn(
    narrow: Narrow, hdb_home: Path, tmp_path: Path, astronaut: Path
) -> None:
    ok("base", "add", "mine", narrow.folder("sd1"))
    ok("new", astronaut, "bob", "--base", "mine", "--targets", "all", "--steps", 1)
    identity = load(store.path_of("bob"))
    assert len(identity.down) == 286 and store.path_of("bob").stat().st_size <= 120_000
    ok("gen", "bob", "a [V] face", "-n", 1, "--steps", 1, "-o", tmp_path / "bob.png")
    kinds = told("inspect", "bob")
    assert kinds["verified"] is True and kinds["shares"]["kind"]["convolution"] > 0
    assert refused(
        "new", astronaut, "c", "--base", "mine", "--targets", "x", says="attention and all"
    )
