"""Identities made from identities, from the command line: exact, told, and nothing lost."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from click.testing import Result
from commands import hdb
from identities import describe, facts
from PIL import Image
from torch import Tensor

from hdbcli.identity.derivation import read_weights, relaxed
from hdbcli.identity.file import Identity, load, save
from hdbcli.identity.inspection import TargetEnergy, block_of
from hdbcli.method.lidb import Theta
from hdbcli.model.base import Base
from registry import store
from registry.errors import HdbError

Keep = Callable[..., Path]


@pytest.fixture
def keep(hdb_home: Path) -> Keep:
    """Return a function that stores a random identity under a name."""

    def put(name: str, seed: int = 0, rank: int = 2, basis: str = "d" * 64) -> Path:
        generator = torch.Generator().manual_seed(seed)
        identity = Identity(
            facts(family="tiny", basis_digest=basis, lineage=()),
            torch.randn(3, rank, 8, generator=generator),
            torch.randn(3, 6, rank, generator=generator),
        )
        path = store.path_of(name)
        save(identity, path)
        return path

    return put


def core(path: Path) -> Tensor:
    identity = load(path)
    return identity.up @ identity.down


def says(result: Result, *texts: str) -> None:
    assert result.exit_code in (1, 2) and not result.stdout, result.output
    assert all(text in result.stderr for text in texts), result.stderr


def test_relax_keeps_what_it_draws(keep: Keep) -> None:
    alice = keep("alice")
    before, bytes_before = core(alice), alice.read_bytes()
    assert hdb("relax", "alice", "--rank", 4, "--as", "wide").exit_code == 0
    wide = load(store.path_of("wide"))
    assert wide.rank == 4 and (core(store.path_of("wide")) - before).abs().max() < 1e-6
    assert wide.down[:, 2:].abs().sum() > 0  # the added ranks can learn
    assert wide.facts.lineage[-1] == "relaxed from rank 2 to 4" and wide.facts.likeness is None
    assert alice.read_bytes() == bytes_before
    says(hdb("relax", "alice", "--rank", 9), "from rank 2 to 9", "2 to 6")
    says(hdb("relax", "alice", "--rank", 2), "has rank 2 already")
    says(hdb("relax", "alice", "--rank", 2, "--as", "same"), "has rank 2 already")
    assert alice.read_bytes() == bytes_before
    says(hdb("relax", "alice", "--rank", 4, "--as", "Wide"), "wide exists already")
    assert hdb("relax", "alice", "--rank", 3).exit_code == 0
    assert load(alice).rank == 3  # without --as it replaces


@pytest.mark.parametrize("dtype", ["fp32", "fp16", "int8"])
def test_relax_keeps_it_in_the_numbers_of_its_file(keep: Keep, dtype: str) -> None:
    alice = keep("alice")
    save(replace(load(alice), up=load(alice).up / 3), alice, dtype)
    assert hdb("relax", "alice", "--rank", 4, "--as", "wide").exit_code == 0
    wide = store.path_of("wide")
    assert (core(wide) - core(alice)).abs().max() < 1e-6
    assert store.summary(wide)["dtype"] == dtype
    save(relaxed(load(alice), 4), wide, "int8" if dtype == "fp16" else "fp16")
    assert (core(wide) - core(alice)).abs().max() > 1e-4  # the control: other numbers round


def test_shrink_says_what_it_costs_before_it_writes(keep: Keep) -> None:
    alice = keep("alice", rank=3)
    before = core(alice)
    says(hdb("shrink", "alice", "--rank", 1), "is lost", "--as NEW")  # told, and not replaced
    assert load(alice).rank == 3
    result = hdb("shrink", "alice", "--rank", 1, "--as", "small", "--dtype", "int8")
    assert result.exit_code == 0
    small = core(store.path_of("small"))
    off = float((small - before).square().sum() / before.square().sum())
    lost = float(result.stderr.split("energy, ")[1].split("%")[0]) / 100
    assert off == pytest.approx(lost, abs=0.01) and 0.1 < off < 0.9
    assert store.path_of("small").stat().st_size < alice.stat().st_size
    says(hdb("shrink", "alice", "--rank", 5, "--as", "x"), "from rank 3 to 5")
    says(hdb("shrink", "alice", "--rank", 1, "--as", "x", "--dtype", "int4"), "unknown dtype")


def test_compose_is_the_sum(keep: Keep) -> None:
    alice, bob = keep("alice", 0), keep("bob", 1)
    assert hdb("compose", "alice=0.6", "bob=-0.4", "--as", "carol").exit_code == 0
    carol = load(store.path_of("carol"))
    expected = 0.6 * core(alice) - 0.4 * core(bob)
    assert (core(store.path_of("carol")) - expected).abs().max() < 4e-3  # fp16 keeps 11 bits
    assert carol.rank == 4 and carol.facts.lineage == ("composed of 0.6 alice + -0.4 bob",)
    words = ("compose", "alice", "bob", "carol", "--as", "all", "--dtype", "fp32")
    assert hdb(*words).exit_code == 0
    exact = core(alice) + core(bob) + core(store.path_of("carol"))
    assert load(store.path_of("all")).rank == 6  # b, though the ranks are eight
    assert (core(store.path_of("all")) - exact).abs().max() < 1e-5
    whole = load(store.path_of("all")).facts.lineage
    assert whole == ("composed of 1 alice + 1 bob + 1 carol", "composed of 0.6 alice + -0.4 bob")
    assert hdb("compose", "carol=0.5", "bob=0.5", "--as", "dora").exit_code == 0
    assert store.composed_of("alice") == ["all", "carol", "dora"]  # though dora names carol
    says(hdb(*words), "all exists already")


def test_a_composition_names_what_is_in_it_without_paths(keep: Keep) -> None:
    alice, names = keep("alice"), ["a" * 53 + str(k) for k in range(4)]
    keep("bob")
    assert hdb("compose", f"{alice}=0.5", "bob=0.5", "--as", "carol").exit_code == 0
    assert load(store.path_of("carol")).facts.lineage == ("composed of 0.5 alice + 0.5 bob",)
    assert store.composed_of("alice") == ["carol"]
    for name in names:
        keep(name)
    assert hdb("compose", *names, "--as", "all").exit_code == 0  # too long for one line
    assert load(store.path_of("all")).facts.lineage == tuple(
        f"composed of 1 {name}" for name in names
    )
    assert [store.composed_of(name) for name in names] == [["all"]] * 4


def test_compose_refuses_what_cannot_be_added_up(keep: Keep) -> None:
    alice = keep("alice")
    keep("stranger", basis="f" * 64), keep("bob", 1)
    says(hdb("compose", "alice", "stranger", "--as", "x"), "basis_digest is dddd", "and ffff")
    says(hdb("compose", "alice", "alise", "--as", "x"), "alise", "alice")
    for field, value in (("family", "sd1"), ("base_digest", "a" * 64), ("targets_digest", "9")):
        save(load(alice).saying(**{field: value}), store.path_of("odd"))
        says(hdb("compose", "alice", "odd", "--as", "x"), "cannot be added up", field)
    for words, text in (
        (("alice=much", "bob"), "'alice=much' has no weight"),
        (("alice=nan", "bob"), "'alice=nan' has no weight"),
        (("alice=1e999", "bob"), "has no weight"),
        (("alice", "alice"), "alice comes twice"),
        (("alice", "bob", "--rank", 5), "from rank 4 to 5"),
        (("alice", "bob", "--dtype", "int4"), "unknown dtype 'int4'"),
    ):
        says(hdb("compose", *words, "--as", "x"), text)
    says(hdb("compose", "alice", "bob", "--as", "../x"), "not a valid name")
    says(hdb("compose", "alice", "bob", "--as", "Alice"), "alice exists already")
    assert store.names() == ["alice", "bob", "odd", "stranger"]
    result = hdb("compose", "alice", "bob", "--as", "alice", "--force", "--json")  # the control
    assert json.loads(result.stdout)["rank"] == 4 and load(alice).rank == 4


def test_ranks_above_b_are_refused(keep: Keep) -> None:
    keep("alice", rank=5), keep("bob", 1, rank=5)
    says(hdb("relax", "alice", "--rank", 7, "--as", "x"), "5 to 6")
    says(hdb("compose", "alice", "bob", "--rank", 8, "--as", "x"), "rank 8 is above b 6")
    assert hdb("relax", "alice", "--rank", 6, "--as", "x").exit_code == 0
    assert hdb("compose", "alice", "bob", "--rank", 6, "--as", "y").exit_code == 0


def test_an_output_never_takes_the_place_of_what_is_read(keep: Keep, tmp_path: Path) -> None:
    alice = keep("alice")
    outside = tmp_path / "bob.safetensors"
    outside.write_bytes(alice.read_bytes())
    before = alice.read_bytes()
    for words in (("export", "--force", "-o"), ("inspect", "-o")):
        says(hdb(words[0], "alice", *words[1:], alice), "is the input file")
        says(hdb(words[0], outside, *words[1:], outside), "is the input file")
        says(hdb(words[0], "alice", *words[1:], alice.with_name("x.safetensors")), "among the iden")
    assert alice.read_bytes() == outside.read_bytes() == before
    assert os.listdir(alice.parent) == [alice.name]
    assert hdb("inspect", "alice", "-o", tmp_path / "fine.png").exit_code == 0


def test_weights_are_numbers_and_each_name_comes_once() -> None:
    assert read_weights(["a=0.5", "b=-2", "c"]) == {"a": 0.5, "b": -2.0, "c": 1.0}
    for part in ("a=x", "a=nan", "a=inf"):
        with pytest.raises(HdbError, match="has no weight"):
            read_weights([part])
    with pytest.raises(HdbError, match="a comes twice"):
        read_weights(["a=1", "a=2"])


def test_copy_and_rename(keep: Keep) -> None:
    alice = keep("alice")
    content = alice.read_bytes()
    assert hdb("cp", "alice", "bob").exit_code == 0
    assert store.path_of("bob").read_bytes() == content == alice.read_bytes()
    says(hdb("cp", "alice", "bob"), "bob exists already")
    says(hdb("cp", "alice", "../bob"), "..")
    assert "bob is now carol" in hdb("mv", "bob", "carol").stdout
    assert not store.path_of("bob").exists() and store.path_of("carol").read_bytes() == content
    says(hdb("mv", "missing", "x"), "missing")
    says(hdb("mv", "alice", "carol"), "carol exists already")
    assert hdb("mv", "alice", "carol", "--force").exit_code == 0 and not alice.exists()
    alice.write_bytes(content[:-4])
    says(hdb("cp", "alice", "dave"), "alice")  # what is damaged is not copied
    assert not store.path_of("dave").exists()


def test_inspect_adds_up(keep: Keep, tmp_path: Path) -> None:
    alice = keep("alice")
    result = hdb("inspect", "alice", "--json", "-o", tmp_path / "a.png")
    assert result.exit_code == 0, result.stderr
    values = json.loads(result.stdout)
    assert values["energy"] == pytest.approx(float(core(alice).square().sum()), rel=1e-4)
    assert values["verified"] is False and "targets" in values["problem"]  # no identity of tiny's
    assert sum(t["numbers"] for t in values["targets"]) == load(alice).numbers
    assert all(t["singular"] == sorted(t["singular"], reverse=True) for t in values["targets"])
    assert Image.open(tmp_path / "a.png").size[0] == 1200
    assert "strongest targets" in hdb("inspect", "alice").stdout
    says(hdb("inspect", "missing"), "missing")


def test_inspect_names_the_targets_of_a_real_identity(tiny: Base, hdb_home: Path) -> None:
    theta = tiny.first_theta()
    theta = Theta(theta.down, theta.up + 0.01)
    save(describe(tiny, theta, ""), store.path_of("alice"))
    values = json.loads(hdb("inspect", "alice", "--json").stdout)
    assert values["verified"] is True and values["problem"] is None
    assert [t["name"] for t in values["targets"]] == list(tiny.injected.layers)
    unet = [TargetEnergy(**t) for t in values["targets"] if t["component"] == "unet"]
    blocks = list(dict.fromkeys(block_of(target.name) for target in unet))
    levels = [f"down {k}" for k in range(3)], [f"up {k}" for k in range(3)]
    assert blocks == [*levels[0], "mid", *levels[1]]  # theta's order is that of depth
    shares = values["shares"]
    assert set(shares["component"]) == {"unet", "text_encoder"}
    assert set(shares["kind"]) == {
        "self-attention",
        "cross-attention",
        "convolution",
        "projection",
    }
    assert all(sum(part.values()) == pytest.approx(1) for part in shares.values())


def test_number_formats_are_the_files_or_the_budgets(keep: Keep) -> None:
    generator = torch.Generator().manual_seed(0)
    for name in ("alice", "bob"):  # 84,000 numbers together: 120 KB hold that in int8 alone
        down = torch.randn(150, 4, 40, generator=generator)
        up = torch.randn(150, 30, 4, generator=generator)
        save(replace(load(keep(name)), down=down, up=up), store.path_of(name), "int8")

    def made(*words: object) -> tuple[str, int]:
        assert hdb(*words).exit_code == 0
        facts = store.summary(store.path_of("new"))
        return facts["dtype"], facts["bytes"]

    compose = "compose", "alice", "bob", "--as", "new", "--force"
    assert made(*compose)[0] == "int8" and made(*compose)[1] <= 120_000
    assert made(*compose, "--rank", 4)[0] == "fp16"  # which fits
    assert made(*compose, "--dtype", "fp16")[0] == "fp16"
    shrink = "shrink", "alice", "--rank", 3, "--as", "new", "--force"
    dtype, size = made(*shrink)
    assert dtype == "int8" and size < store.path_of("alice").stat().st_size
    assert made(*shrink, "--dtype", "fp16")[1] > size
    save(load(store.path_of("alice")), store.path_of("alice"), "fp32")
    assert made(*shrink)[0] == "fp32"
