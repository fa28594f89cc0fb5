"""The likeness loss: pictures drawn with gradients, and faces embedded with gradients."""

from __future__ import annotations

import shutil
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from chips import chip
from commands import ok
from diffusers import DDIMScheduler, LCMScheduler
from identities import LATENT
from safetensors.torch import load_file
from torch import Tensor

from hdbcli.config import PORTRAIT, RefineConfig
from hdbcli.faces.dlib import load_dlib
from hdbcli.faces.embedding import recognisers
from hdbcli.faces.photo import crop_face
from hdbcli.faces.recogniser import NUMBERS
from hdbcli.method.hypernet import Faces
from hdbcli.method.lidb import Theta
from hdbcli.model.base import Base, load_predictor
from hdbcli.model.sample import generate
from hdbcli.training.likeness_loss import (
    AHEAD,
    Sight,
    apart,
    before_last,
    contrast,
    draft,
    likeness,
    mosaic,
    picture,
    places_of,
    portrait_likeness,
    sight,
)
from hdbcli.training.questions import Question, ask, diffusion_loss
from hdbcli.training.refine import refine
from registry.errors import HdbError
from registry.seeds import generator_of
from registry.spec import SampleSettings
from registry.stable_diffusion.backbone import StableDiffusion

HELD_OUT = Path(__file__).parents[1] / "data/heldout"
PROMPTS = ["a sks face"] * 2


@pytest.fixture(scope="module")
def crops(tiny: Base) -> list[np.ndarray]:
    photos = [folder / "photo-0.jpg" for folder in sorted(HELD_OUT.iterdir())[:6]]
    template = np.array(tiny.spec.template)
    return [crop_face(photo, template, tiny.spec.resolution).image for photo in photos]


@pytest.fixture(scope="module")
def predicted(tiny: Base, crops: list[np.ndarray]) -> Theta:
    with torch.no_grad():
        return load_predictor(tiny)[0](tiny.faces(crops))


def noise(count: int) -> Tensor:
    return torch.randn((count, *LATENT), generator=torch.Generator().manual_seed(0))


def test_chips_are_those_that_opencv_cuts(tiny: Base, crops: list[np.ndarray]) -> None:
    template, images = np.array(tiny.spec.template), tiny.images(crops)
    told = tiny.embed(images).split(NUMBERS, 1)
    for recogniser, own, near in zip(recognisers(), told, (0.02, 0.1), strict=True):
        ours = recogniser.chips(images, template)
        theirs = np.stack([chip(crop, template * len(crop), recogniser) for crop in crops])
        theirs = torch.from_numpy(theirs).permute(0, 3, 1, 2).float()
        assert (ours - theirs).abs().mean() < 1  # of 255
        assert (recogniser.chips(images, template + 0.02) - theirs).abs().mean() > 3
        with torch.no_grad():
            far = (own - recogniser(theirs)).norm(dim=1)
        assert far.max() < near  # two people are 0.65 apart, or 1.3


def test_chips_of_large_crops_lose_nothing_between_samples(tiny: Base) -> None:
    """Stripes two pixels wide are grey from afar; read without averaging they are stripes."""
    stripes = (torch.arange(600) // 2 % 2).float().mul(2).sub(1).expand(1, 3, 600, 600)
    chips = load_dlib().chips(stripes, np.array(tiny.spec.template))
    assert (chips - 127.5).abs().max() < 20


def test_a_draft_of_many_steps_is_what_ddim_draws(
    tiny: Base, predicted: Theta, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline = tiny.backbone.pipeline
    plain = DDIMScheduler.from_config(pipeline.scheduler.config)
    monkeypatch.setattr(pipeline, "scheduler", plain)
    settings = SampleSettings(steps=10, scheduler="ddim", guidance=2.0, trailing=True)
    drawn = generate(tiny, predicted[:1], PORTRAIT, [3], settings, lambda *_: None)[0].image
    start = torch.randn((1, *LATENT), generator=torch.Generator().manual_seed(3))
    backbone, prompts = tiny.backbone, [tiny.prompt(PORTRAIT)]
    with torch.no_grad(), tiny.adapted(predicted[:1]):
        many, few, other = (
            _pixels(backbone.decode(draft(backbone, prompts, each, steps, 2.0)))
            for each, steps in ((start, 10), (start, 3), (start.flip(-1), 10))
        )
    far = [np.abs(each - drawn.astype(float)).mean() for each in (many, few, other)]
    assert far[0] < 2 and far[0] < far[1] / 2 and far[0] < far[2] / 2, far


@pytest.mark.parametrize("renews", [False, True], ids=["ddim", "lcm"])
@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_a_perfect_network_drafts_the_picture_and_has_no_loss(
    kind: str, renews: bool, tiny: Base, crops: list[np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether the first noise stays, or every step adds its own where the base draws so."""
    backbone = tiny.backbone
    assert isinstance(backbone, StableDiffusion)
    schedule = backbone.pipeline.scheduler
    steps_like = LCMScheduler if renews else DDIMScheduler
    whole = {"prediction_type": kind, "rescale_betas_zero_snr": False}  # noise alone says nothing
    own = steps_like.from_config(schedule.config, **whole)
    monkeypatch.setattr(backbone.pipeline, "scheduler", own)
    clean, rest = backbone.encode_images(tiny.images(crops[:2])), noise(2)
    noises, samples = [], []

    def perfect(self: StableDiffusion, noisy: Tensor, steps: Tensor, _: object) -> Tensor:
        a, s = self._mix(steps, noisy)
        x = clean.repeat(len(noisy) // len(clean), 1, 1, 1)
        n = (noisy - a * x) / s
        noises.append(n[:2])
        samples.append(len(noisy))
        return n if kind == "epsilon" else a * n - s * x

    monkeypatch.setattr(StableDiffusion, "_predict", perfect)
    asked = PROMPTS, rest, torch.tensor([0.2, 0.9])
    assert diffusion_loss(backbone, clean, *asked).max() < 1e-10
    assert diffusion_loss(backbone, clean.flip(0), *asked).min() > 0.01
    a, s = backbone._mix(torch.tensor(len(own.alphas_cumprod) - 1), clean)
    noises.clear()
    drawn = draft(backbone, PROMPTS, a * clean + s * rest, 3, 5.0)
    far = [(each - noises[0]).abs().mean() for each in noises]
    assert far[0] == 0 and all((each > 0.5) == renews for each in far[1:]), far
    assert all(0.9 < each.std() < 1.1 for each in noises)  # noise it is, each time
    assert (drawn - clean).abs().max() < 1e-3 < (drawn.flip(0) - clean).abs().max()
    noises.clear(), samples.clear()
    last = before_last(backbone, PROMPTS, a * clean + s * rest, 8, 1.0, taken=2)
    early = picture(backbone, last, backbone.predict(*last), 1.0)
    assert samples == [2, 2], "two steps of eight, and without guidance one pass each"
    assert (early - clean).abs().max() < 1e-3


def _pixels(images: Tensor) -> np.ndarray:
    return ((images[0].clamp(-1, 1) + 1) * 127.5).permute(1, 2, 0).numpy()


def test_loss_knows_who_is_drawn(tiny: Base, crops: list[np.ndarray], predicted: Theta) -> None:
    true = tiny.images(crops)
    prompts, start = [tiny.prompt(PORTRAIT)] * len(crops), noise(len(crops))
    with torch.no_grad(), tiny.injected.adapted(predicted):
        own, other = (
            likeness(tiny, prompts, start, each).answered(tiny.backbone)
            for each in (true, true.roll(1, 0))
        )
    assert own.shape == (len(crops),) and own.mean() < other.mean() - 0.05


def test_each_of_what_is_compared_tells_people_apart(tiny: Base, crops: list[np.ndarray]) -> None:
    images, places = tiny.images(crops), np.array(tiny.spec.template)
    own = sight(images, places)
    assert apart(own, own).max() == 0
    far = [
        float(
            apart(own._replace(**{name: (*part[:k], each.roll(1, 0), *part[k + 1 :])}), own).mean()
        )
        for name in ("embeddings", "features")
        for part in [getattr(own, name)]
        for k, each in enumerate(part)
    ]
    repainted = own._replace(colours=own.colours.roll(1, 0))
    far.append(float(apart(repainted, own).mean()))
    coloured = torch.arange(len(crops)) % 2 == 0
    seen = apart(repainted, own, coloured)
    assert seen[~coloured].max() == 0 and torch.equal(
        seen[coloured], apart(repainted, own)[coloured]
    )
    assert len(far) == 2 + 6 + 1 and min(far) > 0.02, far
    other = own._replace(contrast=own.contrast.roll(1, 0))
    assert apart(other, own).max() == 0  # finished pictures alone are asked for it
    assert [each.shape[1] for each in own.features] == [64, 128, 256, 256, 512, 1024]


def test_faces_are_compared_where_they_were_drawn(tiny: Base, crops: list[np.ndarray]) -> None:
    """At half the size, and elsewhere, as in professional shots; where none is found, as told."""
    template, side = np.array(tiny.spec.template), tiny.spec.resolution
    small = np.full((3, side, side, 3), 128, np.uint8)
    shift = side // 4, side // 8
    for canvas, crop in zip(small, crops[:2], strict=False):
        halved = cv2.resize(crop, None, fx=0.5, fy=0.5, interpolation=cv2.INTER_AREA)
        canvas[shift[1] : shift[1] + side // 2, shift[0] : shift[0] + side // 2] = halved
    images, true = tiny.images(list(small)), tiny.images([*crops[:2], crops[0]])
    found = places_of(images, template)
    assert np.abs(found[:2] - (template / 2 + np.array(shift) / side)).max() < 0.03
    assert (found[2] == template).all()
    there, elsewhere = (
        apart(sight(images[:2], places), sight(true[:2], template))
        for places in (found[:2], template)
    )
    assert (there < 0.7 * elsewhere).all(), (there, elsewhere)


def test_marks_that_fool_one_recogniser_fool_neither_its_features_nor_another(
    tiny: Base, crops: list[np.ndarray]
) -> None:
    """A stranger's picture, changed by a few levels a pixel until its embedding is the person's."""
    places = np.array(tiny.spec.template)
    person, stranger = tiny.images(crops[:1]), tiny.images(crops[1:2])
    with torch.no_grad():
        true, before = sight(person, places), sight(stranger, places)
    marked = stranger.clone().requires_grad_(True)
    for _ in range(30):
        far = (sight(marked, places).embeddings[0] - true.embeddings[0]).square().sum()
        (slope,) = torch.autograd.grad(far, marked)
        marked = (marked - 0.004 * slope.sign()).detach().requires_grad_(True)
    with torch.no_grad():
        fooled = sight(marked, places)
    assert (marked - stranger).abs().mean() < 0.08  # of 2

    def away(seen: Sight, recogniser: int) -> float:
        return float((seen.embeddings[recogniser] - true.embeddings[recogniser]).square().sum())

    def far_in_features(seen: Sight) -> float:
        kept = true._replace(features=(*seen.features[:3], *true.features[3:]))
        return float(apart(kept, true).detach())

    assert away(fooled, 0) < 0.1 * away(before, 0)
    assert away(fooled, 1) > 0.5 * away(before, 1)  # which was not asked
    assert far_in_features(fooled) > 0.5 * far_in_features(before)


def test_mosaics_see_complexion_and_not_wrinkles() -> None:
    plain = torch.full((1, 3, 64, 64), 0.2)
    lines = plain + 0.3 * (torch.arange(64) % 2 * 2 - 1)
    dark, edge = plain - 0.3, plain.clone()
    edge[..., :16] = -1
    assert mosaic(plain).shape == (1, 3, 8, 8)
    assert (mosaic(lines) - mosaic(plain)).abs().max() < 1e-6
    assert (mosaic(edge) - mosaic(plain)).abs().max() == 0  # the background is not compared
    assert (mosaic(dark) - mosaic(plain)).mean() == pytest.approx(-0.3)


def test_contrast_sees_wrinkles_and_not_complexion() -> None:
    """Lines of +-0.3, a pixel each, are 0.4 off the mean of three; where there are none 0.01 stays,
    so that the logarithm has a slope. A face in half the light has as much less everywhere."""
    plain = torch.full((1, 3, 64, 64), 0.2, requires_grad=True)
    lines = 0.3 * (torch.arange(64) % 2 * 2 - 1)
    assert contrast(plain).shape == (1, 1, 8, 8)
    assert (contrast(plain - 0.3).exp() - 0.01).abs().max() < 1e-6
    assert (contrast(plain + lines).exp() - 0.4).abs().max() < 1e-3
    assert (contrast(plain + lines / 2).exp() - 0.2).abs().max() < 1e-3
    deep, shallow = contrast(lines.expand(1, 3, 64, 64)), contrast(0.1 * lines.expand(1, 3, 64, 64))
    assert (deep - contrast(lines.expand(1, 3, 64, 64) / 2)).sub(np.log(2)).abs().max() < 1e-2
    assert shallow.min() > contrast(plain).max() + 1  # what dark faces have is still seen
    contrast(plain).sum().backward()
    assert plain.grad is not None and plain.grad.isfinite().all()


def test_a_person_in_a_haze_is_not_them(
    tiny: Base, crops: list[np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blurred over 5 pixels a picture keeps its colours, so it is its contrast that is missed."""
    backbone = tiny.backbone
    assert isinstance(backbone, StableDiffusion)
    pipeline = backbone.pipeline  # one whose drafts are whole drawings
    whole = DDIMScheduler.from_config(pipeline.scheduler.config)
    monkeypatch.setattr(pipeline, "scheduler", whole)
    clean = backbone.encode_images(tiny.images(crops[:2]))
    monkeypatch.setattr("hdbcli.training.likeness_loss.picture", lambda *_: clean)
    with torch.no_grad(), tiny.injected.adapted(None):
        drawn = backbone.decode(clean)
        hazy = torch.nn.functional.avg_pool2d(drawn, 5, 1, 2, count_include_pad=False)
        own, other = (
            likeness(tiny, PROMPTS, noise(2), true, "fp32").answered(backbone)
            for true in (drawn, hazy)
        )
    colours = (mosaic(drawn) - mosaic(hazy)).square().mean((2, 3)).sum(1)
    assert own.max() < 1e-6 and other.min() > 0.005 and (other > 10 * colours).all()


def test_gradients_reach_theta_and_nothing_else(tiny: Base, crops: list[np.ndarray]) -> None:
    first = tiny.first_theta(people=2)
    theta = Theta(first.down, (0.01 * torch.randn(first.up.shape)).requires_grad_(True))
    with tiny.injected.adapted(theta):
        far = likeness(tiny, PROMPTS, noise(2), tiny.images(crops[:2])).answered(tiny.backbone)
        far[0].backward()
    assert theta.up.grad is not None
    assert theta.up.grad[0].abs().sum(dim=(1, 2)).min() > 0  # every target of the first person
    assert not theta.up.grad[1].any()
    assert isinstance(tiny.backbone, StableDiffusion)
    modules = [*tiny.backbone.components.values(), tiny.backbone.autoencoder]
    frozen = [p for module in modules for p in module.parameters()]
    assert all(p.grad is None for p in frozen)


def test_only_the_last_step_of_a_draft_keeps_its_gradient(
    tiny: Base, predicted: Theta, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The picture is the same either way."""
    plain, learns = StableDiffusion._predict, []

    def seen(self: StableDiffusion, *asked: Any) -> Tensor:
        learns.append(torch.is_grad_enabled())
        return plain(self, *asked)

    monkeypatch.setattr(StableDiffusion, "_predict", seen)
    theta = Theta(predicted.down[:2], predicted.up[:2].clone().requires_grad_(True))
    with tiny.adapted(theta):
        drawn = draft(tiny.backbone, PROMPTS, noise(2), 3, 2.0)
        assert learns == [False, False, True]
        with torch.no_grad():
            again = draft(tiny.backbone, PROMPTS, noise(2), 3, 2.0)
        assert learns[3:] == [False] * 3
    assert drawn.grad_fn is not None
    assert (drawn - again).abs().max() < 1e-4 < (drawn - again.flip(0)).abs().max()


def test_a_step_along_the_gradient_brings_the_person_nearer(
    tiny: Base, crops: list[np.ndarray], predicted: Theta
) -> None:
    theta = Theta(
        *(core[:2].clone().requires_grad_(True) for core in (predicted.down, predicted.up))
    )
    true = tiny.images(crops[:2])

    def far(adapter: Theta) -> Tensor:
        with tiny.injected.adapted(adapter):
            return likeness(tiny, PROMPTS, noise(2), true).answered(tiny.backbone).sum()

    before = far(theta)
    before.backward()
    moved = []
    with torch.no_grad():
        for sign in (-1, 1):
            size = 3e-3 * sign  # of 1e-3 bfloat16 would leave only its own rounding
            new = (c + size * c.grad / c.grad.norm() * c.norm() for c in (theta.down, theta.up))
            moved.append(far(Theta(*new)))
    assert moved[0] < before < moved[1]


@pytest.fixture
def without_preservation(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out the loss of other prompts, which has tests of its own."""
    monkeypatch.setattr("hdbcli.training.refine.preservation", lambda *_: None)


@pytest.mark.usefixtures("without_preservation")
def test_refinement_learns_from_what_it_draws(
    tiny: Base, crops: list[np.ndarray], predicted: Theta
) -> None:
    some, start = crops[:2], predicted[:2]
    faces = [tiny.faces([crop]) for crop in some]
    latents = [each.latents for each in faces]
    true = tiny.images(some)

    def far(theta: Theta) -> Tensor:  # from the photo, in eight portraits of other noise
        asked = true.repeat(4, 1, 1, 1)
        with torch.no_grad(), tiny.injected.adapted(theta):
            return likeness(tiny, PROMPTS * 4, noise(8), asked).answered(tiny.backbone)

    config = RefineConfig(steps=8, rank=1, lr=1e-2, batch=2, likeness=1.0)
    with_it, without = (
        far(refine(tiny, start, latents, each, lambda *_: None, faces).theta).mean()
        for each in (config, replace(config, likeness=0.0))
    )
    assert with_it < far(start).mean() and with_it < without - 0.005


@pytest.mark.usefixtures("without_preservation")
def test_people_that_learn_likeness_side_by_side_are_each_as_if_alone(
    tiny: Base, crops: list[np.ndarray], predicted: Theta, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In float32: in bfloat16 Adam turns the last bit of a gradient near 0 into a whole step."""
    monkeypatch.setattr("hdbcli.training.questions.autocast", lambda *_, **__: nullcontext())
    monkeypatch.setattr("hdbcli.training.likeness_loss.autocast", lambda *_, **__: nullcontext())
    monkeypatch.setattr("hdbcli.training.likeness_loss.SHARE", 2)  # two portraits each
    faces = [tiny.faces(crops[:1]), tiny.faces(crops[1:3])]  # the second has two photos
    latents = [tiny.backbone.encode_images(each.crops) for each in faces]
    config = RefineConfig(steps=2, rank=1, batch=4, optimizer="adamw", likeness=1.0)

    def refined(*people: int, likeness: float = 1.0) -> Tensor:
        own = predicted[list(people)], [latents[p] for p in people]
        settings = replace(config, likeness=likeness)
        theirs = [faces[p] for p in people]
        return refine(tiny, *own, settings, lambda *_: None, theirs).theta.up - own[0].up

    together, without = refined(0, 1), refined(0, 1, likeness=0.0)
    for p in range(2):
        alone = refined(p)[0]
        assert (together[p] - alone).abs().mean() < 0.02 * alone.abs().mean()
        assert (without[p] - alone).abs().mean() > 0.5 * alone.abs().mean()


def test_the_likeness_of_every_photo_counts(
    tiny: Base, crops: list[np.ndarray], predicted: Theta
) -> None:
    def value(faces: Faces, weight: float, turn: int) -> float:
        asks, generator = portrait_likeness(tiny, [faces], weight), torch.Generator().manual_seed(0)
        (part,) = ask(tiny, lambda: predicted[:1], [asks(predicted[:1], generator, 2, turn)])
        return float(part.detach())

    two, mixed = tiny.faces(crops[:2]), tiny.faces([crops[0], crops[3]])
    losses = [[value(faces, 1.0, turn) for turn in (0, 1)] for faces in (two, mixed)]
    assert losses[0][0] == losses[1][0] and losses[0][1] != losses[1][1]  # a photo a step
    assert value(two, 3.0, 0) == pytest.approx(3 * losses[0][0])


def test_portraits_begun_together_are_those_begun_alone(
    tiny: Base, crops: list[np.ndarray], predicted: Theta, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of two people, one of whom has two photos; where memory is short each step begins its own.
    A portrait's face is not looked for: it lies where the template says."""
    monkeypatch.setattr("hdbcli.training.likeness_loss.places_of", lambda _, otherwise: otherwise)
    faces, theta = [tiny.faces(crops[:1]), tiny.faces(crops[1:3])], predicted[:2]
    prompts = [tiny.prompt(PORTRAIT)] * 2
    shape = faces[0].latents.shape[1:]
    short = replace(tiny, plan=replace(tiny.plan, at_once=2))
    together, one_by_one = (asked(base, faces, theta) for base in (tiny, short))
    starts = torch.randn((AHEAD, *shape), generator=generator_of(seed_of_starts()))
    for many, one in zip(together, one_by_one, strict=True):
        far = (many.samples.clean - one.samples.clean).abs().mean()
        assert far < 0.01 * one.samples.clean.std()
    with torch.no_grad(), tiny.adapted(theta):
        for turn, (each, start) in enumerate(zip(together, starts, strict=True)):
            shown = [turn % len(each.crops) for each in faces]
            true = torch.stack([f.crops[k] for f, k in zip(faces, shown, strict=True)])
            alone = likeness(tiny, prompts, start.expand(2, *shape), true)
            far = (each.samples.clean - alone.samples.clean).abs().mean(), each.samples.clean.std()
            assert far[0] < 0.01 * far[1]
            loss = float(each.answered(tiny.backbone))
            assert loss == pytest.approx(float(alone.answered(tiny.backbone).sum()), rel=0.01)
            other = likeness(tiny, prompts, starts.flip(0)[turn].expand(2, *shape), true)
            assert (each.samples.clean - other.samples.clean).abs().mean() > 0.1 * far[1]


def asked(base: Base, faces: list[Faces], theta: Theta) -> list[Question]:
    """Ask for the likeness of AHEAD steps; what else they draw does not depend on the memory."""
    asks, generator = portrait_likeness(base, faces, 1.0), generator_of(0)
    questions = [asks(theta, generator, 2, turn) for turn in range(AHEAD)]
    after = generator_of(0)
    torch.randint(2**31, (), generator=after)
    assert generator.get_state().equal(after.get_state())
    return questions


def seed_of_starts() -> int:
    """Return the seed of the portraits' noise where the steps draw from seed 0."""
    return int(torch.randint(2**31, (), generator=generator_of(0)))


def test_a_base_that_cannot_draft_says_so(tiny: Base) -> None:
    class Plain:
        pass

    other = replace(tiny, backbone=Plain())  # type: ignore[arg-type]
    with pytest.raises(HdbError, match="leave --likeness out"):
        likeness(other, PROMPTS, noise(2), torch.zeros(2, 3, 128, 128))


def test_train_with_likeness_and_from_a_file(tiny: Base, hdb_home: Path, tmp_path: Path) -> None:
    for folder in sorted(HELD_OUT.iterdir())[:2]:
        shutil.copytree(folder, tmp_path / "people" / folder.name)
    assert tiny.spec.hypernetwork

    def trained(name: str, *more: object) -> dict[str, Tensor]:
        out = tmp_path / f"{name}.safetensors"
        words = ["--steps", 1, "--batch", 2, "--lr", 1e-4, "--held-out", 0, *more]
        ok("train", "hypernetwork", tmp_path / "people", "--out", out, *words)
        return load_file(out)

    def apart(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
        same = [key for key in one if one[key].shape == other[key].shape]  # new ones read latents
        return max(float((one[key].float() - other[key].float()).abs().max()) for key in same)

    start = load_file(tiny.spec.hypernetwork)
    fresh, plain, with_it = (
        trained("fresh"),
        trained("plain", "--from", tiny.spec.hypernetwork),
        trained("with", "--from", tiny.spec.hypernetwork, "--likeness", 100, "--share", 1),
    )
    assert apart(fresh, start) > 0.1 > 2e-3 > apart(plain, start)
    assert 0 < apart(plain, with_it) < 2e-3
