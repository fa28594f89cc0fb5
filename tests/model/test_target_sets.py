"""Convolutions as targets of a whole base, from the hypernetwork to the exported file."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from identities import describe

from hdbcli.identity.derivation import relaxed
from hdbcli.identity.file import Identity, fit, load, save, theta_for
from hdbcli.identity.inspection import inspect
from hdbcli.interop import merged_files
from hdbcli.interop.diffusers_reader import load_for_real
from hdbcli.interop.export import export_tensors
from hdbcli.interop.lora_stack import Lora, stack
from hdbcli.interop.merge import Merge
from hdbcli.method.hypernet import TRAITS, Faces
from hdbcli.method.lidb import LiDBConv2d, Theta
from hdbcli.model.base import Base, load_base
from hdbcli.model.files import open_checkpoint
from hdbcli.training.hypernetwork import new_hypernetwork
from hdbcli.training.questions import diffusion_loss
from registry.errors import HdbError
from registry.plugins import load_registry
from registry.spec import BaseSpec
from registry.stable_diffusion.families import ATTENTION, CONVOLUTIONS, TEXT

PLAIN = 80  # targets of attention alone


@pytest.fixture(scope="module")
def spec() -> BaseSpec:
    """Return the shipped base with both target sets."""
    tiny = load_registry().get("tiny")
    few = {"unet": ATTENTION, "text_encoder": TEXT}
    more = {**few, "unet": (*ATTENTION, *CONVOLUTIONS)}
    return replace(tiny, targets=few, target_sets={"attention": few, "all": more})


def load_all(spec: BaseSpec) -> Base:
    return load_base(spec.with_targets("all"), "cpu")


@pytest.fixture(scope="module")
def base(spec: BaseSpec) -> Base:
    return load_all(spec)


def random_theta(base: Base, people: int, rank: int = 2) -> Theta:
    start = base.first_theta(rank, people)
    generator = torch.Generator().manual_seed(people)
    return Theta(start.down, 0.2 * torch.randn(start.up.shape, generator=generator))


@pytest.fixture(scope="module")
def identity(base: Base, tmp_path_factory: pytest.TempPathFactory) -> Identity:
    path = tmp_path_factory.mktemp("identity") / "alice.safetensors"
    save(describe(base, random_theta(base, 1), ""), path, "fp32")
    return load(path)


def loss(base: Base, theta: Theta | None, people: int) -> torch.Tensor:
    side = base.spec.resolution // base.backbone.pipeline.vae_scale_factor
    channels = base.backbone.pipeline.unet.config.in_channels
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn((1, channels, side, side), generator=generator).expand(people, -1, -1, -1)
    with base.injected.adapted(theta):
        t = torch.full((people,), 0.5)
        return diffusion_loss(base.backbone, noise.flip(1), ["a sks face"] * people, noise, t)


def test_a_spec_offers_target_sets_by_name(spec: BaseSpec) -> None:
    assert spec.with_targets("all").targets == spec.target_sets["all"] != spec.targets
    with pytest.raises(HdbError, match="no targets 'some'; it has attention and all"):
        spec.with_targets("some")
    with pytest.raises(HdbError, match="one set without a name"):
        replace(spec, target_sets={}).with_targets("all")
    with pytest.raises(HdbError, match="hold no pattern"):
        replace(spec, target_sets={"none": {}})


def test_an_identity_brings_its_target_set(spec: BaseSpec, base: Base, identity: Identity) -> None:
    """By the digest of its targets, loaded or from files; one of the other set gets the other."""
    convolutions = [n for n, m in base.injected.layers.items() if isinstance(m, LiDBConv2d)]
    assert len(convolutions) > 20 and len(base.injected.layers) == PLAIN + len(convolutions)
    checkpoint = open_checkpoint(spec, identity.facts.targets_digest)
    assert checkpoint.shapes == base.injected.shapes
    assert checkpoint.fingerprint() == base.injected.fingerprint()
    assert fit(identity, spec, checkpoint) is None
    assert theta_for(base, identity)[1] is None
    plain = open_checkpoint(spec)
    assert (
        len(plain.places) == PLAIN
        and open_checkpoint(spec, plain.targets_digest()).shapes == plain.shapes
    )
    with pytest.raises(HdbError, match="with targets"):
        fit(identity, spec, plain)
    again = load_base(spec, "cpu", targets_digest=identity.facts.targets_digest)
    assert again.injected.shapes == base.injected.shapes
    result = inspect(identity, list(base.injected.layers), True, None)
    assert result.share("kind")["convolution"] > 0.1
    kinds = {target.kind for target in result.targets if target.name in convolutions}
    assert kinds <= {"convolution", "projection"}


def test_people_in_one_batch_are_as_alone(base: Base) -> None:
    theta = random_theta(base, 3)
    with torch.no_grad():
        together = loss(base, theta, 3)
        alone = torch.cat([loss(base, theta[i : i + 1], 1) for i in range(3)])
        torch.testing.assert_close(together, alone, atol=1e-4, rtol=1e-4)
        assert (together - loss(base, None, 3)).abs().min() > 1e-4
        person = describe(base, theta[:1], "")
        wider = relaxed(person, 5).theta
        torch.testing.assert_close(loss(base, wider, 1), alone[:1], atol=1e-6, rtol=1e-5)


def test_a_hypernetwork_learns_every_target(base: Base) -> None:
    model = new_hypernetwork(base, 0)
    assert model.config.targets == len(base.injected.layers)
    images = torch.randn(2, 3, 128, 128)
    latents = base.backbone.encode_images(images)
    faces = Faces(images, torch.randn(2, TRAITS) / 25, latents)
    loss(base, model(faces), 2).sum().backward()
    assert model.heads.grad is not None
    assert (model.heads.grad.abs().amax((1, 2)) > 0).all()


def test_merged_is_what_was_injected(
    spec: BaseSpec, base: Base, identity: Identity, tmp_path: Path
) -> None:
    checkpoint = open_checkpoint(spec, identity.facts.targets_digest)
    out = tmp_path / "m"
    merged_files.write_folder(
        Merge(checkpoint, identity.theta, "fp32"), out, "alice", lambda *_: None
    )
    merged = UNet2DConditionModel.from_pretrained(out / "unet")
    unet = base.backbone.pipeline.unet
    x = torch.randn(
        (1, unet.config.in_channels, 16, 16), generator=torch.Generator().manual_seed(0)
    )
    states = torch.randn((1, 77, unet.config.cross_attention_dim))
    with torch.no_grad():
        plain = unet(x, 500, states).sample
        with base.injected.adapted(identity.theta):
            adapted = unet(x, 500, states).sample
        got = merged(x, 500, states).sample
    assert (got - adapted).abs().max() < 1e-3 < 0.05 < (got - plain).abs().max()


@pytest.mark.parametrize("form", ["kohya", "diffusers"])
def test_diffusers_loads_the_exported_convolutions(
    spec: BaseSpec, base: Base, identity: Identity, form: str
) -> None:
    theta = identity.theta
    tensors = export_tensors(base, theta, form, "fp32")
    conv = "lora_unet_mid_block_resnets_0_conv1.lora_down.weight"
    conv = conv if form == "kohya" else "unet.mid_block.resnets.0.conv1.lora_A.weight"
    layer = base.backbone.pipeline.unet.mid_block.resnets[0].conv1.base
    assert tensors[conv].shape == (2, *layer.weight.shape[1:])
    up = tensors[conv.replace("lora_down", "lora_up").replace("lora_A", "lora_B")]
    assert up.shape == (len(layer.weight), 2, 1, 1)
    reading = load_for_real(load_all(spec), theta, tensors)[0]
    assert reading.ok and reading.total == len(base.injected.layers), reading
    reading = load_for_real(load_all(spec), theta.scaled(1.1), tensors)[0]
    assert not reading.ok and reading.mapped == 0  # the control


def test_a_lora_is_added_under_the_residual(spec: BaseSpec, identity: Identity) -> None:
    base, path = load_all(spec), "mid_block.resnets.0.conv1"
    layer = base.injected.layers[f"unet.{path}"]
    before = layer.base.weight.clone()
    n, c, *kernel = before.shape
    down, up = torch.randn(2, c, *kernel), torch.randn(n, 2, 1, 1)
    stem = f"lora_unet_{path.replace('.', '_')}"
    tensors = {f"{stem}.lora_down.weight": down, f"{stem}.lora_up.weight": up}
    (stacked,) = stack(base, [Lora(Path("style"), 0.5, "", tensors, {})])
    assert stacked.layers == 1 and not stacked.unread
    added = torch.einsum("nrxy,rchw->nchw", up, down) / 2
    torch.testing.assert_close(layer.base.weight, before + added)
    with base.injected.adapted(identity.theta):
        x = torch.randn(1, c, 8, 8)
        whole = before + added + layer.delta().view_as(before)
        expected = torch.nn.functional.conv2d(x, whole, layer.base.bias, padding=1)
        torch.testing.assert_close(layer(x), expected, atol=1e-3, rtol=1e-4)


def test_recomputing_gives_the_same_gradients(spec: BaseSpec, base: Base) -> None:
    theta = random_theta(base, 2)
    frugal = load_all(spec)
    frugal.backbone.save_memory(recompute=True)
    frugal.backbone.pipeline.unet.train()
    gradients = []
    for each in (base, frugal):
        up = theta.up.clone().requires_grad_(True)
        injected = each.injected
        with injected.adapted(Theta(theta.down, up)):
            unet = each.backbone.pipeline.unet
            x = torch.randn(
                (2, unet.config.in_channels, 16, 16), generator=torch.Generator().manual_seed(0)
            )
            states = torch.ones((2, 77, unet.config.cross_attention_dim))
            unet(x, 500, states).sample.square().mean().backward()
        assert up.grad is not None
        gradients.append(up.grad)
    assert gradients[0].abs().max() > 1e-4
    torch.testing.assert_close(gradients[0], gradients[1], atol=1e-6, rtol=1e-4)
