"""The basis is a pure function: same numbers everywhere, orthonormal, another for every name
and seed."""

from __future__ import annotations

import time

import pytest
import torch

from hdbcli.method.basis import down_basis, fingerprint, orthonormal, signs, up_basis
from hdbcli.method.inject import in_order
from registry.errors import HdbError
from registry.stable_diffusion.families import FAMILIES


def sd15_targets() -> dict[str, tuple[int, int]]:
    """Name SD 1.5's 192 targets with the (n, m) of their weights, from its
    published configuration."""
    targets = {}
    blocks = [
        (f"down_blocks.{i}.attentions.{j}", w)
        for i, w in enumerate((320, 640, 1280))
        for j in (0, 1)
    ]
    blocks += [("mid_block.attentions.0", 1280)]
    widths = {1: 1280, 2: 640, 3: 320}
    blocks += [(f"up_blocks.{i}.attentions.{j}", widths[i]) for i in (1, 2, 3) for j in range(3)]
    for block, width in blocks:
        stem = f"unet.{block}.transformer_blocks.0"
        for attention, context in (("attn1", width), ("attn2", 768)):
            targets[f"{stem}.{attention}.to_q"] = (width, width)
            targets[f"{stem}.{attention}.to_k"] = (width, context)
            targets[f"{stem}.{attention}.to_v"] = (width, context)
            targets[f"{stem}.{attention}.to_out.0"] = (width, width)
        targets[f"{stem}.ff.net.0.proj"] = (8 * width, width)
    for i in range(12):
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            path = f"text_encoder.text_model.encoder.layers.{i}.self_attn.{name}"
            targets[path] = (768, 768)
    order = in_order(targets, {"unet": (".*",), "text_encoder": (".*",)})
    return {name: targets[name] for name in order}


def test_orthonormal() -> None:
    down, up = down_basis(7, "unet.x", 20, 64), up_basis(7, "unet.x", 10, 48)
    assert down.shape == (20, 64) and up.shape == (48, 10)
    torch.testing.assert_close(down @ down.T, torch.eye(20), atol=1e-6, rtol=0)
    torch.testing.assert_close(up.T @ up, torch.eye(10), atol=1e-6, rtol=0)
    raw = signs(7, "unet.x", "down", 20, 64).float()
    assert not torch.allclose(raw @ raw.T, 64 * torch.eye(20))  # the signs alone are not


def test_pure_function_of_its_name() -> None:
    state = torch.random.get_rng_state()
    first = down_basis(7, "unet.x", 20, 64)
    torch.manual_seed(1)
    assert torch.equal(first, down_basis(7, "unet.x", 20, 64))
    torch.random.set_rng_state(state)
    down_basis(7, "unet.x", 20, 64)
    assert torch.equal(torch.random.get_rng_state(), state)  # the global generator is not touched
    for other in (down_basis(8, "unet.x", 20, 64), down_basis(7, "unet.y", 20, 64)):
        assert (first - other).abs().max() > 0.1
    assert (first[:10].T - up_basis(7, "unet.x", 10, 64)).abs().max() > 0.1  # the sides differ


def test_values_are_pinned() -> None:
    """A change of a single number would orphan every identity ever made."""
    assert signs(0, "t", "up", 2, 8).tolist() == [
        [1, 1, -1, -1, 1, -1, 1, -1],
        [-1, 1, 1, 1, -1, -1, 1, -1],
    ]
    probe = down_basis(20230713, "unet.a", 8, 32)
    torch.testing.assert_close(probe[-1, :3], torch.tensor(PINNED), atol=1e-6, rtol=0)


def test_sd15_digest() -> None:
    targets = sd15_targets()
    assert len(targets) == 192 and len(targets) * 150 == 28_800
    assert fingerprint(20230713, targets, 100, 50).digest == SD15_DIGEST
    order = dict(reversed(targets.items()))
    assert fingerprint(20230713, order, 100, 50).digest != SD15_DIGEST


@pytest.mark.slow  # seconds are nothing to fail a change for: `hdb bench basis` promises them too
def test_sd15_basis_takes_no_time() -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        start = time.process_time()
        for name, (n, m) in sd15_targets().items():
            down_basis(20230713, name, 100, m)
            up_basis(20230713, name, 50, n)
        assert time.process_time() - start < 2.0
    finally:
        torch.set_num_threads(threads)


def test_too_narrow_is_an_error() -> None:
    with pytest.raises(HdbError, match="16 wide"):
        down_basis(0, "unet.x", 17, 16)
    with pytest.raises(HdbError, match="degenerate"):
        down_basis(0, "unet.x", 2, 2)  # both rows are (-1, 1)
    assert down_basis(2, "unet.x", 2, 2).shape == (2, 2)
    assert down_basis(0, "unet.x", 8, 32).shape == (8, 32)


def test_orthonormal_keeps_the_span() -> None:
    matrix = signs(3, "s", "down", 4, 32)
    basis = orthonormal(matrix)
    torch.testing.assert_close(matrix @ basis.T @ basis, matrix)


PINNED = [0.2020370364189148, 0.11878849565982819, -0.26073524355888367]
SD15_DIGEST = "5cd8cb94ba93c436c992a9ffec1c40aaa10c8eb56fefcf288d34f8284bd5e117"


def test_probes_are_pinned() -> None:
    """Identities that are out there hold them."""
    told = fingerprint(20230713, {"unet.a": (24, 32), "unet.b": (16, 40)}, 8, 4)
    assert told.probes == pytest.approx((-0.263230, -0.179002, -0.385292, 0.356369), abs=1e-5)
    assert {family.basis_seed for family in FAMILIES.values()} == {20230713}
