"""What hdb calls exact, held against weights, and at the size of Stable Diffusion 1.5."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from identities import describe, facts
from torch import Tensor

from hdbcli.identity.derivation import composed, relaxed
from hdbcli.identity.file import Identity, load, save
from hdbcli.method.lidb import Theta
from hdbcli.model.base import Base

SD15 = {"targets": 192, "a": 100, "b": 50}
# How a rank's strength may compare with the rank before it: none is weaker, to far weaker.
SPECTRA = {"flat": 1.0, "halving": 0.5, "steep": 0.1}


def weights(base: Base, theta: Theta) -> dict[str, Tensor]:
    """Return dW of every target."""
    with base.injected.adapted(theta):
        return {name: layer.delta() for name, layer in base.injected.layers.items()}


def worst(left: dict[str, Tensor], right: dict[str, Tensor]) -> float:
    assert left.keys() == right.keys()
    return max(float((left[name] - right[name]).abs().max()) for name in left)


def on_tiny(base: Base, seed: int, rank: int) -> Identity:
    """Return a random identity of the strength that refinement gives."""
    first = base.first_theta(rank)
    generator = torch.Generator().manual_seed(seed)
    up = 0.1 * torch.randn(first.up.shape, generator=generator)
    return describe(base, Theta(first.down, up), "")


def of_sd15(seed: int, rank: int = 4, falling: float = 1.0) -> Identity:
    """Return a random identity of Stable Diffusion 1.5's size; each rank is `falling` times
    the last."""
    generator = torch.Generator().manual_seed(seed)
    targets, a, b = SD15.values()
    strengths = falling ** torch.arange(rank)
    up = 0.02 * torch.randn(targets, b, rank, generator=generator) * strengths
    return Identity(
        facts(base="sd15", probes=(0.0123456789, -0.25, 0.1, 0.2)),
        torch.randn(targets, rank, a, generator=generator),
        up,
    )


@pytest.fixture
def one_core() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_a_relaxed_identity_has_the_weights_of_the_original(tiny: Base) -> None:
    alice = on_tiny(tiny, 0, 2)
    before = weights(tiny, alice.theta)
    wide = relaxed(alice, 6)
    assert wide.rank == 6 and worst(weights(tiny, wide.theta), before) < 1e-6
    wide.up[:, :, 5] += 1e-4  # the control: an added rank that does something
    assert worst(weights(tiny, wide.theta), before) > 1e-6


def test_a_composed_identity_has_the_sum_of_the_weights_on_every_target(tiny: Base) -> None:
    alice, bob = on_tiny(tiny, 0, 2), on_tiny(tiny, 1, 3)
    a, b = weights(tiny, alice.theta), weights(tiny, bob.theta)
    carol = composed({"alice": (alice, 0.6), "bob": (bob, -0.4)}, None)
    got = weights(tiny, carol.theta)
    assert worst(got, {name: 0.6 * a[name] - 0.4 * b[name] for name in a}) < 1e-6
    swapped = {name: -0.4 * a[name] + 0.6 * b[name] for name in a}  # the control
    assert worst(got, swapped) > 1e-3


@pytest.mark.parametrize(("rank", "whole"), [(4, 8), (30, 50)])
def test_a_sum_has_the_ranks_of_both_up_to_b(rank: int, whole: int) -> None:
    parts = {name: (of_sd15(seed, rank), 0.5) for seed, name in enumerate(("alice", "bob"))}
    assert composed(parts, None).rank == whole


@pytest.mark.slow  # by the processor's time, which other work on the machine lengthens all the same
@pytest.mark.parametrize("rank", [4, 30])
def test_composing_two_takes_no_time(rank: int, tmp_path: Path, one_core: None) -> None:
    """Read two files, add them up and write a third: a fraction of a second of the processor's
    time, even where ranks must go."""
    paths = {name: tmp_path / f"{name}.safetensors" for name in ("alice", "bob", "carol")}
    save(of_sd15(0, rank), paths["alice"]), save(of_sd15(1, rank), paths["bob"])
    seconds = []
    for _ in range(7):  # the fastest: a busy machine slows some of them
        start = time.process_time()
        parts = {name: (load(paths[name]), 0.5) for name in ("alice", "bob")}
        made = composed(parts, None)
        save(made, paths["carol"])
        seconds.append(time.process_time() - start)
    assert min(seconds) < 0.5, seconds


@pytest.mark.parametrize("spectrum", SPECTRA)
def test_four_ranks_in_int8_fit_and_keep_their_energy(spectrum: str, tmp_path: Path) -> None:
    made, path = of_sd15(2, 4, SPECTRA[spectrum]), tmp_path / "alice.safetensors"
    assert save(made, path, "int8") == path.stat().st_size <= 120_000
    kept = energy_kept(made, load(path))
    assert kept.shape == (192,) and kept.min() >= 0.999, float(kept.min())
    four_bits = energy_kept(made, rounded(made, 7))  # the control: half the bits
    assert four_bits.min() < 0.999


def test_a_sum_in_int8_keeps_its_energy_too(tmp_path: Path) -> None:
    alice, path = of_sd15(3, 2), tmp_path / "carol.safetensors"
    bob = of_sd15(4, 2)
    bob.down.mul_(0.05).add_(alice.down), bob.up.mul_(0.05).add_(alice.up)  # much alike
    wanted = composed({"alice": (alice, 1.0), "bob": (bob, -1.0)}, None)
    assert save(wanted, path, "int8") <= 120_000
    assert energy_kept(wanted, load(path)).min() >= 0.999


def energy_kept(first: Identity, second: Identity) -> Tensor:
    """Return for each target 1 - |dW - dW'|^2 / |dW|^2; the basis is orthonormal, cores suffice."""
    mine, theirs = (x.up.double() @ x.down.double() for x in (first, second))
    return 1 - (mine - theirs).square().sum((1, 2)) / mine.square().sum((1, 2))


def rounded(identity: Identity, levels: int) -> Identity:
    down, up = (
        (side / (step := side.abs().amax(dim, keepdim=True) / levels)).round() * step
        for side, dim in ((identity.down, 2), (identity.up, 1))
    )
    return replace(identity, down=down, up=up)
