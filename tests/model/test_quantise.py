"""Quantised bases: near the whole ones, differentiable whatever ran before, and told when they
cannot be had."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from hdbcli.config import RefineConfig
from hdbcli.model.base import Base, load_base, load_predictor
from hdbcli.model.memory import MemoryPlan
from hdbcli.model.quantise import quantise, quantised
from hdbcli.training.questions import diffusion_loss
from hdbcli.training.refine import refine
from registry.plugins import load_registry
from registry.stable_diffusion.loading import load_folder

if TYPE_CHECKING:
    from cutdown import Narrow

FACE = Path(__file__).parents[1] / "data" / "heldout" / "900000" / "photo-0.jpg"
pytestmark = pytest.mark.usefixtures("keep_freed_memory")
KINDS = ("int8", "nf4")
NEAR = {"int8": 0.02, "nf4": 0.2}  # of a layer's output, root mean square


def tiny_in(plan: MemoryPlan) -> Base:
    return load_base(load_registry().get("tiny"), "cpu", plan)


def far(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layer_is_near_and_smaller(kind: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(128, 192).to(dtype)
    layer = quantised(linear, kind)
    assert layer.weight.element_size() == 1
    assert layer.weight.numel() * (2 if kind == "nf4" else 1) == linear.weight.numel()
    x = torch.randn(3, 7, 128, dtype=dtype)
    with torch.no_grad():
        assert 0 < far(layer(x).float(), linear(x).float()) < NEAR[kind]
    assert layer(x).dtype == dtype and not any(p.requires_grad for p in layer.parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_flows_after_a_pass_without_one(kind: str) -> None:
    """Bitsandbytes packs 4-bit weights for a kernel without gradient, if it is left alone."""
    torch.manual_seed(0)
    linear = nn.Linear(128, 192)
    layer = quantised(linear, kind)
    x = torch.randn(2, 5, 128)
    with torch.no_grad():
        before = layer(x)
    wanted, got = x.clone().requires_grad_(True), x.clone().requires_grad_(True)
    weights = torch.randn(2, 5, 192)
    (linear(wanted) * weights).sum().backward()
    (layer(got) * weights).sum().backward()
    assert got.grad is not None and wanted.grad is not None
    assert far(got.grad, wanted.grad) < NEAR[kind]
    torch.testing.assert_close(layer(x).detach(), before, atol=2e-2, rtol=2e-2)


def test_only_plain_layers_are_replaced() -> None:
    class Own(nn.Linear):
        """A third-party layer that does more."""

    model = nn.Sequential(nn.Linear(64, 64), nn.Conv2d(3, 3, 1), Own(64, 64), nn.Embedding(9, 64))
    kinds = [type(part) for part in model]
    assert quantise([model], "int8") is None
    assert type(model[0]) is not nn.Linear and [type(p) for p in model][1:] == kinds[1:]


def test_broken_bitsandbytes_leaves_all_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    model, other = nn.Sequential(nn.Linear(64, 64)), nn.Sequential(nn.Linear(64, 64))
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "bitsandbytes.nn", None)
        note = quantise([model], "nf4")
        assert note and "weights are not quantised" in note and "\n" not in note
        assert type(model[0]) is nn.Linear
        assert quantise([other], "int8") is None  # which needs no library
    assert quantise([model], "nf4") is None and type(model[0]) is not nn.Linear


def test_int8_rounds_rows_by_their_largest_and_nothing_else() -> None:
    linear = nn.Linear(4, 3)
    with torch.no_grad():
        linear.weight.copy_(torch.tensor([[1.27, 0.015, -0.5, 0], [0, 0, 0, 0], [0, 1e-6, 0, 0]]))
    layer = quantised(linear, "int8")
    weight = layer.weight.float() * layer.step.T
    wanted = torch.tensor([[1.27, 0.02, -0.5, 0], [0, 0, 0, 0], [0, 1e-6, 0, 0]])
    torch.testing.assert_close(weight, wanted, atol=1e-8, rtol=1e-6)
    x = torch.randn(2, 7, 4)
    torch.testing.assert_close(layer(x), F.linear(x, weight, linear.bias))
    turned = x.mT.contiguous().mT  # as an attention block of one sample hands it over
    assert not turned.is_contiguous()
    torch.testing.assert_close(layer(turned), layer(x))


def test_int8_takes_float16_as_far_as_float16_goes() -> None:
    linear = nn.Linear(512, 8, bias=False)
    with torch.no_grad():
        linear.weight.copy_(torch.linspace(0.001, 0.01, 8)[:, None].expand(8, 512))
    half, whole = quantised(linear.half(), "int8"), quantised(linear.float(), "int8")
    x = torch.linspace(1, 200, 512)[None]
    assert not F.linear(x.half(), half.weight.half()).isfinite().all()  # the control: unscaled
    torch.testing.assert_close(half(x.half()).float(), whole(x), rtol=2e-3, atol=0)
    exact = F.linear(x.double(), whole.weight.double() * whole.step.T.double())
    torch.testing.assert_close(whole(x).double(), exact, rtol=1e-6, atol=0)
    x = x.half().requires_grad_(True)
    half(x).sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad[0], linear.weight.sum(0).half(), rtol=2e-3, atol=0)


def test_int8_keeps_nothing_but_its_weight_for_the_backward_pass() -> None:
    """So gradient checkpointing saves what it promises: no layer keeps its input."""
    kept: list[Tensor] = []
    layer = quantised(nn.Linear(64, 96), "int8")
    x = torch.randn(5, 64, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = layer(x)
    assert {tuple(t.shape) for t in kept} == {(96, 64), (1, 96)}
    y.square().sum().backward()
    assert x.grad is not None and x.grad.dtype == torch.float32


@pytest.fixture(
    scope="module", params=["float32", pytest.param("bfloat16", marks=pytest.mark.slow)]
)
def whole(request: pytest.FixtureRequest) -> tuple[str, list[Tensor], float]:
    """Refine on tiny as it is: the format of its weights, the latents, and the loss at the end."""
    dtype = request.param
    base = tiny_in(MemoryPlan("whole", dtype))
    face = np.asarray(Image.open(FACE).convert("RGB").resize((128, 128)))
    latents = [base.backbone.encode_images(base.images([face]))]
    return dtype, latents, losses(base, latents)[1]


def losses(base: Base, latents: list[Tensor]) -> tuple[float, float]:
    config = RefineConfig(steps=12, rank=2, lr=5e-3, batch=2)
    result = refine(base, base.first_theta(2), latents, config, lambda *_: None)
    return float(result.loss_start), float(result.loss_end)


@pytest.mark.parametrize("kind", KINDS)
def test_quantised_bases_refine_as_whole_ones_do(
    kind: str, whole: tuple[str, list[Tensor], float]
) -> None:
    dtype, latents, known = whole
    start, end = losses(tiny_in(MemoryPlan(kind, dtype, kind)), latents)
    assert end < 0.97 * start  # something was learnt
    assert abs(end / known - 1) < (0.08 if kind == "nf4" else 0.03), (end, known)


@pytest.mark.parametrize("kind", KINDS)
def test_cut_down_stable_diffusion_is_near_its_whole_self(narrow: Narrow, kind: str) -> None:
    found = []
    for changed in (False, True):
        backbone = load_folder(narrow.folder("sd1"), "cpu", "bfloat16")
        if changed:
            assert quantise(backbone.components.values(), kind) is None
        generator = torch.Generator().manual_seed(0)
        latents, noise = torch.randn((2, 1, 4, 8, 8), generator=generator)
        with torch.no_grad():
            found.append(
                diffusion_loss(backbone, latents, ["a sks face"], noise, torch.tensor([0.6]))
            )
        assert backbone.pipeline.unet.dtype == torch.bfloat16
    assert 0 < abs(float(found[1] / found[0]) - 1) < 0.03


def test_identities_know_the_base_whatever_holds_it(tiny: Base) -> None:
    digest = tiny.injected.weights_digest()
    plans = ("half", "bfloat16", None), ("nf4", "bfloat16", "nf4"), ("nf4", "float32", "nf4")
    for plan in (MemoryPlan(*each) for each in plans):
        base = tiny_in(plan)
        assert base.injected.weights_digest() == digest
        bare = replace(base.injected, digest=None)
        assert bare.weights_digest() != digest  # what rounding would have made of it


def test_face_encoder_in_8_bits_predicts_the_same(tiny: Base) -> None:
    from hdbcli.model.memory import PLANS

    generator = np.random.default_rng(0)
    crop = generator.integers(0, 255, (128, 128, 3), dtype=np.uint8)
    faces = tiny.faces([crop])
    whole = load_predictor(tiny)[0].predict(faces)
    few, _ = load_predictor(replace(tiny, plan=PLANS[-2]))
    held = [p.element_size() for p in few.encoder.parameters() if p.dim() == 2]
    assert held.count(1) == 2 * few.config.encoder_layers
    eight = few.predict(faces)
    assert 0 < far(eight.up, whole.up) < 0.05 and far(eight.down, whole.down) < 0.05
