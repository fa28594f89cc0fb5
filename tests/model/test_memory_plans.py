"""What a memory plan changes in the work, gradient checkpointing, parts of a batch, the autoencoder
let go of, and what it must not: the numbers that are learnt."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
import torch
from identities import LATENT
from torch import Tensor

from hdbcli.config import RefineConfig
from hdbcli.method.lidb import LiDBConv2d, LiDBLinear, Theta
from hdbcli.model.base import Base, load_base
from hdbcli.model.memory import NORMAL, PLANS, MemoryPlan
from hdbcli.training import objective
from hdbcli.training.likeness_loss import likeness
from hdbcli.training.questions import diffusion_loss
from hdbcli.training.refine import portrait_loss, refine, train, trainable_lidb
from registry.plugins import load_registry
from registry.stable_diffusion.families import FAMILIES
from registry.stable_diffusion.loading import load_folder, load_single

if TYPE_CHECKING:
    from cutdown import Narrow

TINY = load_registry().get("tiny")


def latents_of(base: Base) -> list[Tensor]:
    images = torch.rand((3, 3, 64, 64), generator=torch.Generator().manual_seed(1)) * 2 - 1
    return [base.backbone.encode_images(images)]


@contextmanager
def exact_numbers(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Leave out bfloat16 products inside the block."""
    with monkeypatch.context() as patch:
        patch.setattr("hdbcli.training.questions.autocast", lambda *_, **__: nullcontext())
        yield


def gradient(base: Base, monkeypatch: pytest.MonkeyPatch) -> tuple[Tensor, int]:
    """Return theta's gradient in the first step of refinement, and how often layers ran."""
    trainable, runs = trainable_lidb(base, base.first_theta()), []
    flat = trainable.parameters["theta"]
    optimizer = torch.optim.SGD([flat], lr=1e-9)
    hooks = [
        layer.register_forward_pre_hook(lambda *_: runs.append(1))
        for layer in base.injected.layers.values()
    ]
    with exact_numbers(monkeypatch):
        next(train(base, trainable, latents_of(base), RefineConfig(steps=1, batch=8), optimizer))
    for hook in hooks:
        hook.remove()
    assert flat.grad is not None
    return flat.grad, len(runs)


def test_neither_checkpointing_nor_parts_change_gradients(
    tiny: Base, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted, once = gradient(tiny, monkeypatch)
    assert once == len(tiny.injected.layers) and wanted.abs().max() > 0
    for plan, passes in (
        (MemoryPlan("recompute", recompute=True, frugal=True), 1),
        (MemoryPlan("parts", at_once=3), 3),  # of 3, 3 and 2 of the batch of 8
        (MemoryPlan("both", recompute=True, at_once=2, frugal=True), 4),
    ):
        base = load_base(TINY, "cpu", plan)
        assert not base.backbone.components["text_encoder"].training
        got, runs = gradient(base, monkeypatch)
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-6 * float(wanted.abs().max()))
        again = runs / (passes * once)  # what lies outside of blocks is not computed again
        assert 1.7 < again <= 2 if plan.recompute else again == 1, plan
        assert all(layer.residual is None for layer in base.injected.layers.values())


def test_hypernetwork_in_parts_has_the_same_gradient(
    tiny: Base, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = torch.Generator().manual_seed(2)
    many, count = 3, 3 * objective.DRAWS
    clean, noise = torch.randn((2, count, *latents_of(tiny)[0].shape[1:]), generator=generator)
    prompts = [tiny.prompt("a [V] face") if i % 3 else "" for i in range(count)]
    samples = objective.Samples(clean, prompts, noise, torch.rand(count, generator=generator))
    first = tiny.first_theta(people=many)
    down = first.down + torch.randn(many, 1, 1, 1, generator=generator)
    up = torch.randn(first.up.shape, generator=generator) * 0.1
    found = []
    for plan in (None, NORMAL, PLANS[2]):
        theta = Theta(*(core.clone().requires_grad_(True) for core in (down, up)))
        value = torch.zeros(())
        if plan is None:
            with tiny.adapted(theta):
                value = diffusion_loss(tiny.backbone, clean, prompts, noise, samples.t).mean()
                answer = tiny.backbone.predict(clean, prompts, noise, samples.t)
            with torch.no_grad():
                own = tiny.backbone.predict(clean, prompts, noise, samples.t)
            value = value + 2 * (answer - own).square().mean()
            value.backward()
        else:
            base, count = replace(tiny, plan=plan), 0
            for losses, weight in ((objective.diffusion, 1.0), (objective.prior, 2.0)):
                for part in losses(base, theta, samples, weight, "fp32"):
                    part.backward()
                    value, count = value + part.detach(), count + 1
            assert count == 2 * (1 if plan == NORMAL else many)
        assert theta.up.grad is not None and theta.down.grad is not None
        found.append((value.detach(), theta.up.grad, theta.down.grad))
    for whole, one, parts in zip(*found, strict=True):
        torch.testing.assert_close(one, whole, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(parts, whole, rtol=1e-4, atol=1e-6)


def test_autoencoder_is_let_go_of_and_comes_back(tiny: Base) -> None:
    base = load_base(TINY, "cpu", replace(PLANS[2], dtype="float32"))
    latents = latents_of(base)
    before = base.backbone.decode_latents(latents[0])
    base.free_autoencoder()
    assert base.backbone.pipeline.vae is None
    config = RefineConfig(steps=1, rank=1)
    refine(base, base.first_theta(), latents, config, lambda *_: None)
    portrait_loss(base, None, latents, 2)
    assert base.backbone.pipeline.vae is None  # nothing of refinement needs it
    assert (base.backbone.decode_latents(latents[0]) == before).all()
    tiny.free_autoencoder()  # the plan of `tiny` is normal
    assert tiny.backbone.pipeline.vae is not None


def test_cut_down_stable_diffusion_reads_its_autoencoder_again(narrow: Narrow) -> None:
    for backbone in (
        load_folder(narrow.folder("sd1"), "cpu", "bfloat16"),
        load_single(narrow.single("sd1"), FAMILIES["sd1"], "epsilon", "cpu", "bfloat16"),
    ):
        backbone.save_memory(recompute=True)
        parts = [*backbone.components.values(), backbone.pipeline.vae]
        assert {p.dtype for part in parts for p in part.parameters()} == {torch.bfloat16}
        images = torch.rand((1, 3, 64, 64), generator=torch.Generator().manual_seed(0))
        before = backbone.encode_images(images)
        backbone.free_autoencoder()
        assert (backbone.encode_images(images) == before).all()
        assert backbone.pipeline.vae.dtype == torch.bfloat16


def test_quantised_layers_take_adapters(keep_freed_memory: None) -> None:
    base = load_base(TINY, "cpu", PLANS[-1])
    kinds = {(type(layer), type(layer.base).__name__) for layer in base.injected.layers.values()}
    assert kinds == {(LiDBLinear, "Linear4bit"), (LiDBConv2d, "Conv2d")} and not base.notes
    assert base.backbone.components["unet"].conv_in.weight.dtype == torch.bfloat16


def test_likeness_has_its_weight_whole_or_in_parts(tiny: Base) -> None:
    generator = torch.Generator().manual_seed(0)
    count = 2 * objective.DRAWS
    prompts = [tiny.prompt("a [V] face")] * count
    noise = torch.randn((count, *LATENT), generator=generator)
    true = torch.rand((count, 3, 128, 128), generator=generator)
    first = tiny.first_theta(people=2)
    theta = Theta(first.down, 0.2 * torch.randn(first.up.shape, generator=generator))
    coloured = torch.tensor([True, False]).repeat(objective.DRAWS)
    portraits = objective.Portraits(prompts, noise, true, coloured)
    with torch.no_grad(), tiny.injected.adapted(theta):
        far = likeness(tiny, prompts, noise, true, "fp32", coloured).answered(tiny.backbone).mean()
        for plan in (NORMAL, PLANS[2]):
            base = replace(tiny, plan=plan)
            parts = list(objective.likeness(base, theta, portraits, 3.0, "fp32"))
            assert len(parts) == (1 if plan == NORMAL else 2)
            torch.testing.assert_close(sum(parts), 3 * far, rtol=1e-5, atol=0)
