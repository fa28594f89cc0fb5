"""Injection on the shipped base: the right targets, bitwise restored, identities in one batch."""

from __future__ import annotations

import pytest
import torch
from identities import TINY
from torch import nn

from hdbcli.method.inject import digest_names, eject, find_targets, in_order, inject
from hdbcli.method.lidb import LiDBConv2d, LiDBLayer, Theta, first_theta
from hdbcli.model.base import Base
from hdbcli.training.questions import diffusion_loss
from registry.checkpoints.ldm import canonical
from registry.errors import HdbError


def random_theta(base: Base, batch: int) -> Theta:
    generator = torch.Generator().manual_seed(batch)
    start = base.first_theta(people=batch)
    return Theta(start.down, 0.3 * torch.randn(start.up.shape, generator=generator))


def loss(base: Base, theta: Theta | None, batch: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    side = base.backbone.encode_images(torch.zeros(batch, 3, 128, 128)).shape[1:]
    noise = torch.randn((1, *side), generator=generator).expand(batch, -1, -1, -1)
    t = torch.full((batch,), 0.5)
    with base.injected.adapted(theta), torch.no_grad():
        return diffusion_loss(base.backbone, noise.flip(1), ["a sks face"] * batch, noise, t)


def test_targets_of_tiny(tiny: Base) -> None:
    names = list(tiny.injected.layers)
    assert len(names) == TINY[0] and sum(n.startswith("text_encoder.") for n in names) == 8
    assert sum(isinstance(m, LiDBConv2d) for m in tiny.injected.layers.values()) == 50
    assert all(".text_model." in n for n in names if n.startswith("text_encoder"))
    assert not any(
        p.requires_grad for m in tiny.backbone.components.values() for p in m.parameters()
    )


def test_batch_of_people_equals_one_by_one(tiny: Base) -> None:
    theta = random_theta(tiny, 3)
    together = loss(tiny, theta, 3)
    alone = torch.cat([loss(tiny, theta[i : i + 1], 1) for i in range(3)])
    torch.testing.assert_close(together, alone, atol=1e-4, rtol=1e-4)
    assert (together - loss(tiny, None, 3)).abs().min() > 1e-4


def test_theta_0_and_no_adapter_are_the_base(tiny: Base) -> None:
    start = tiny.first_theta()
    assert torch.equal(loss(tiny, start, 1), loss(tiny, None, 1))


def test_gradients_reach_text_and_unet_targets(tiny: Base) -> None:
    theta = random_theta(tiny, 1)
    up = theta.up.clone().requires_grad_(True)
    latents = torch.randn(tiny.backbone.encode_images(torch.zeros(1, 3, 128, 128)).shape)
    with tiny.injected.adapted(Theta(theta.down, up)):
        value = diffusion_loss(
            tiny.backbone, latents, ["a sks face"], latents.flip(1), torch.tensor([0.5])
        )
    value.sum().backward()
    assert up.grad is not None and (up.grad.abs().amax((0, 2, 3)) > 0).all()


def test_eject_restores_bitwise() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 32), nn.GELU(), nn.Linear(32, 24))
    state = {k: v.clone() for k, v in model.state_dict().items()}
    x = torch.randn(2, 3, 32)
    before = model(x)
    injected = inject({"m": model}, {"m": (r"\d",)}, a=4, b=2, seed=1)
    assert list(injected.layers) == ["m.0", "m.2"]
    down, up = torch.randn(1, 2, 1, 4), torch.randn(1, 2, 2, 1)
    with injected.adapted(Theta(down, up)):
        assert (model(x) - before).abs().max() > 1e-3
        eject({"m": model})
    assert {k: v.tolist() for k, v in model.state_dict().items()} == {
        k: v.tolist() for k, v in state.items()
    }
    assert torch.equal(model(x), before)
    assert not any(isinstance(m, LiDBLayer) for m in model.modules())


def test_digests_tell_targets_and_weights(tiny: Base) -> None:
    model = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32))
    one = inject({"m": model}, {"m": (r"0", r"1")}, 2, 2, 0)
    digest = one.weights_digest()
    with torch.no_grad():
        one.layers["m.0"].base.weight[0, 0] += 1
    assert one.weights_digest() != digest
    two = inject({"m": nn.Sequential(nn.Linear(32, 32))}, {"m": (r"0",)}, 2, 2, 0)
    assert one.targets_digest() != two.targets_digest()
    assert digest_names(["a", "b"]) != digest_names(["b", "a"])


def test_order_is_of_names_not_of_modules() -> None:
    targets = {"unet": (".*",), "text_encoder": (".*",)}
    sorted_names = ["unet.b.2.k", "unet.b.2.q", "unet.b.10.k", "unet.c", "text_encoder.a"]
    assert in_order(reversed(sorted_names), targets) == sorted_names
    model = nn.ModuleDict({"z": nn.Linear(8, 8), "b": nn.ModuleDict({"a": nn.Linear(8, 8)})})
    assert list(inject({"m": model}, {"m": (".*",)}, 2, 2, 0).layers) == ["m.b.a", "m.z"]


def test_errors_name_the_values(tiny: Base) -> None:
    model = {"m": nn.Sequential(nn.Linear(4, 4))}
    with pytest.raises(HdbError, match="no component 'u'"):
        find_targets(model, {"u": (".*",)})
    with pytest.raises(HdbError, match="no layer"):
        find_targets(model, {"m": ("nothing",)})
    assert len(find_targets(model, {"m": (".*",)})) == 1
    with pytest.raises(HdbError, match="3 targets"):
        tiny.injected.adapted(first_theta(3, tiny.spec.a, tiny.spec.b)).__enter__()


def test_canonical_names() -> None:
    assert canonical("text_encoder", "encoder.x") == "text_model.encoder.x"
    assert canonical("text_encoder", "text_model.encoder.x") == "text_model.encoder.x"
    assert canonical("unet", "down.x") == "down.x"
