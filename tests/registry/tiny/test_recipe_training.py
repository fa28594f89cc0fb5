"""The trainings of the recipe: latents of the teacher, a small stock autoencoder, and a base that
draws brightness anew."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers import AutoencoderTiny, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPTextModel

from hdbcli.faces.photo import crop_face, read_photo
from registry.checkpoints.ldm import canonical
from registry.errors import HdbError
from registry.spec import SampleSettings
from registry.tiny import TEMPLATE, WEIGHTS
from registry.tiny.recipe.__main__ import main
from registry.tiny.recipe.autoencoder import feature_distance, new_autoencoder, reconstruction
from registry.tiny.recipe.base import go_on_from, new_scheduler, new_unet
from registry.tiny.recipe.decoder import (
    ALIKE,
    BALANCE,
    Discriminator,
    alike,
    hinge,
    portraits_of,
    pull,
)
from registry.tiny.recipe.latents import GROUPS, PORTRAIT, Latents
from registry.tiny.recipe.photographs import KINDS, Photographs
from registry.tiny.recipe.pictures import STYLES
from registry.tiny.recipe.teacher import CHANNELS, load_teacher

STYLE = torch.zeros(4, dtype=torch.int64)  # of the windows of a photograph


def gflop(call: object, *inputs: torch.Tensor) -> float:
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        call(*inputs)  # type: ignore[operator]
    return counter.get_total_flops() / 1e9


def test_a_decode_is_cheap_and_the_network_is_stock(tmp_path: Path) -> None:
    model = new_autoencoder()
    assert gflop(model.decode, torch.zeros(1, CHANNELS, 16, 16)) < 3
    model.save_pretrained(tmp_path)
    again = AutoencoderTiny.from_pretrained(tmp_path)
    image = torch.rand(1, 3, 128, 128) * 2 - 1
    latents = again.encode(image).latents
    assert latents.shape == (1, CHANNELS, 16, 16)
    assert torch.allclose(latents, model.encode(image).latents, atol=1e-5)
    # Fully convolutional: a window is decoded as the same part of the whole, but for its border.
    whole = model.decode(latents).sample
    window = model.decode(latents[:, :, :, :8]).sample
    assert torch.allclose(whole[..., :8], window[..., :8], atol=1e-5)
    assert not torch.allclose(whole[..., 56:64], window[..., 56:64], atol=1e-5)


def test_features_miss_what_a_blur_takes_more_than_a_shade(astronaut: Path) -> None:
    rgb = torch.from_numpy(read_photo(astronaut)).permute(2, 0, 1)[None]
    true = F.interpolate(rgb.float() / 127.5 - 1, size=(64, 64), mode="area")
    blurred = F.avg_pool2d(true, 3, 1, 1, count_include_pad=False)
    shade = F.l1_loss(blurred, true)
    darker = true - shade  # as far away as the blur, by L1 of pixels
    assert feature_distance(true, true).item() == 0
    far, near = feature_distance(blurred, true).item(), feature_distance(darker, true).item()
    assert far > 2 * near > 0


def windows_of(photo: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """Return windows (4, 3, 64, 64) of a photograph, and the same blurred."""
    rgb = torch.from_numpy(read_photo(photo)).permute(2, 0, 1)[None].float() / 127.5 - 1
    whole = F.interpolate(rgb, size=(128, 128), mode="area")
    true = torch.cat([part for half in whole.chunk(2, 2) for part in half.chunk(2, 3)])
    return true, F.avg_pool2d(true, 5, 1, 2, count_include_pad=False)


def gap(judge: Discriminator, one: torch.Tensor, other: torch.Tensor, style: torch.Tensor) -> float:
    """Return how much more the discriminator makes of some windows than of others."""
    pairs = zip(judge(one, style), judge(other, style), strict=True)
    return sum((a.mean() - b.mean()).item() for a, b in pairs)


def test_the_discriminator_learns_what_a_blur_takes_and_pulls_towards_it(astronaut: Path) -> None:
    true, blurred = windows_of(astronaut)
    torch.manual_seed(0)
    judge = Discriminator()
    optimizer = torch.optim.AdamW(judge.parameters(), 1e-3)

    assert abs(gap(judge, true, blurred, STYLE)) < 0.5
    for _ in range(30):
        optimizer.zero_grad()
        hinge(judge(true, STYLE), judge(blurred, STYLE)).backward()
        optimizer.step()
    assert gap(judge, true, blurred, STYLE) > 3
    # Both halves of a gradient are there, the second BALANCE times as long as the first.
    gradient, far = pull(judge, blurred, true, STYLE)
    picture = blurred.clone().requires_grad_()
    reconstruction(picture, true).backward()
    rest = gradient - picture.grad
    assert far.item() == pytest.approx(reconstruction(blurred, true).item(), rel=1e-5)
    assert rest.norm().item() == pytest.approx(BALANCE * picture.grad.norm().item(), rel=1e-3)
    # Likeness adds a third, ALIKE times as long; a photograph that noise hides pulls less.
    third = pull(judge, blurred, true, STYLE, 1.0, torch.mean)[0] - gradient
    assert third.std() < 1e-3 * third.mean()
    assert third.norm().item() == pytest.approx(ALIKE * picture.grad.norm().item(), rel=1e-3)
    half = pull(judge, blurred, true, STYLE, left=0.5)[0]
    assert torch.allclose(gradient - half, picture.grad / 2, atol=1e-6 * picture.grad.abs().max())
    before = sum(each.mean().item() for each in judge(blurred, STYLE))
    after = sum(
        each.mean().item() for each in judge(blurred - 0.1 * rest / rest.abs().max(), STYLE)
    )
    assert after > before


@pytest.fixture
def photographed(astronaut: Path, tmp_path: Path) -> Path:
    """A work folder of the recipe, with the autoencoder that ships and eight pictures of two
    people, who look like each other in a mirror."""
    crop = crop_face(astronaut, np.array(TEMPLATE), 128).image
    pixels = torch.from_numpy(np.stack([crop, crop[:, ::-1]] * 4))
    styles = torch.tensor([STYLES.index("portrait")] * 4 + [STYLES.index("marble")] * 4)
    tensors = {
        "pixels": pixels,
        "styles": styles.to(torch.uint8),
        "people": torch.tensor([1, 2] * 4, dtype=torch.int32),
        "kinds": torch.full((8,), KINDS.index("person"), dtype=torch.uint8),
        "photos": torch.zeros(8, dtype=torch.int32),
        "points": torch.tensor(TEMPLATE).mul(128).repeat(8, 1, 1),
    }
    (tmp_path / "photographs").mkdir()
    for part in ("train-000", "heldout-000"):
        save_file(tensors, tmp_path / f"photographs/{part}.safetensors")
    shutil.copytree(WEIGHTS / "vae", tmp_path / "vae")
    return tmp_path


def test_the_discriminator_asks_for_the_style_that_was_asked_for(astronaut: Path) -> None:
    true, blurred = windows_of(astronaut)
    plain, other = STYLE, STYLE + 1
    torch.manual_seed(0)
    judge = Discriminator()
    optimizer = torch.optim.AdamW(judge.parameters(), 1e-3)
    for _ in range(60):  # sharp is right in one style, soft in the other
        optimizer.zero_grad()
        hinge(judge(true, plain), judge(blurred, plain)).backward()
        hinge(judge(blurred, other), judge(true, other)).backward()
        optimizer.step()
    gaps = [gap(judge, true, blurred, style) for style in (plain, other)]
    assert gaps[0] > 1 and gaps[1] < -1, gaps


def test_likeness_is_looked_for_where_the_face_is(astronaut: Path) -> None:
    """One drawn from noise alone may lie elsewhere than on the photograph; its colours, which are
    compared in place, say so both times."""
    crop = crop_face(astronaut, np.array(TEMPLATE), 128).image
    true = torch.from_numpy(crop).permute(2, 0, 1)[None].float() / 127.5 - 1
    moved = F.pad(true, (16, 0, 12, 0), mode="replicate")[..., :128, :128]
    places = np.array(TEMPLATE)[None]
    style = torch.tensor([PORTRAIT])
    there, here = (alike(true, places, moved, style, free)(moved).item() for free in (True, False))
    assert alike(true, places, true, style, False)(true).item() < 1e-6
    assert here - there > 0.2  # squared distances of embeddings: two people are 0.35 apart


def test_stage_light_of_another_colour_is_no_other_person(astronaut: Path) -> None:
    """Nobody can guess it from nothing but noise; from the photograph with noise on it one can."""
    crop = crop_face(astronaut, np.array(TEMPLATE), 128).image
    true = torch.from_numpy(crop).permute(2, 0, 1)[None].float() / 127.5 - 1
    lit = (true + torch.tensor([-0.4, 0.0, 0.4])[:, None, None]).clamp(-1, 1)
    rock, portrait = (torch.tensor([STYLES.index(each)]) for each in ("rockstar", "portrait"))

    def far(styles: torch.Tensor, free: bool) -> float:
        return alike(true, np.array(TEMPLATE)[None], lit, styles, free)(lit).item()

    assert far(rock, True) < far(portrait, True) - 0.1
    assert far(rock, False) == far(portrait, False)


def test_decoder_and_base_train_on_alone(
    photographed: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    build = photographed
    monkeypatch.setattr("registry.tiny.recipe.sharpen.ADAPTED", 1.0)
    monkeypatch.setattr("registry.tiny.recipe.decoder.DRAWN", 8)
    monkeypatch.setattr("registry.tiny.recipe.base.SHOWN", 1)
    monkeypatch.setattr("registry.tiny.recipe.base.SAMPLING", SampleSettings(1, 1.0))
    for folder in ("new", "old"):
        (tmp_path / folder).mkdir()
    few = ("--lr", "1e-3", "--batch", "4", "--seed", "1")
    assert main(["--build", str(build), "decoder", "--steps", "2", *few]) == 0
    assert changed(build / "vae", WEIGHTS / "vae") == {"decoder"}  # so latents stay
    drawn = load_file(build / "drawn.safetensors")
    true = load_file(build / "latents-128.safetensors")["values"][0, drawn["rows"]]
    far, spread = (drawn["latents"] - true).float().std(), true.float().std()
    assert 0.05 * spread < far < spread  # another picture, and near that one
    assert main(["--build", str(build), "sharpen", "--steps", "2", *few]) == 0
    assert "step 2/2" in capsys.readouterr().out
    assert main(["--build", str(build), "sharpen", "--steps", "2", *few]) == 0
    assert "step" not in capsys.readouterr().out  # it goes on from its last one
    unet, shipped = build / "pipeline/unet", WEIGHTS / "unet"
    assert "mid_block" in changed(unet, shipped)
    assert changed(build / "vae", WEIGHTS / "vae") == {"decoder"}
    shutil.copy(build / "hypernetwork.safetensors", tmp_path / "new/hypernetwork.safetensors")
    shutil.copy(WEIGHTS / "hypernetwork.safetensors", tmp_path / "old")
    assert {"heads", "encoder"} < changed(tmp_path / "new", tmp_path / "old")
    assert not changed(build / "pipeline/text_encoder", WEIGHTS / "text_encoder")


def changed(folder: Path, other: Path) -> set[str]:
    """Return the first words of the names of tensors that differ, as float16 tells them; both
    folders hold the same names."""
    mine, theirs = (load_file(next(each.glob("*.safetensors"))) for each in (folder, other))
    theirs = {canonical(other.name, name): value for name, value in theirs.items()}
    mine = {canonical(folder.name, name): value for name, value in mine.items()}
    assert mine.keys() == theirs.keys()
    return {n.split(".")[0] for n in mine if not torch.equal(mine[n].half(), theirs[n].half())}


def test_a_person_is_predicted_from_portraits_of_theirs() -> None:
    portrait, marble = STYLES.index("portrait"), STYLES.index("marble")
    styles = torch.tensor([portrait, portrait, marble, portrait, marble])
    people = torch.tensor([7, 7, 7, 9, 9])
    count = len(people)
    pictures = Photographs(
        *(torch.zeros(count, 3, 2, 2), styles, people),
        *(torch.zeros(count), torch.zeros(count), torch.zeros(count, 5, 2)),
    )
    rows = torch.tensor([2, 4] * 20)
    chosen = portraits_of(pictures, rows, torch.Generator().manual_seed(0))
    assert set(chosen[::2].tolist()) == {0, 1}
    assert set(chosen[1::2].tolist()) == {3}


def test_the_base_attends_on_every_grid_and_fits_the_budget() -> None:
    unet = new_unet()
    numbers = sum(parameter.numel() for parameter in unet.parameters())
    assert 15e6 < numbers < 25e6
    downs = [any("attn" in n for n, _ in block.named_modules()) for block in unet.down_blocks]
    assert downs == [True, True, True]


def test_a_run_goes_on_from_the_pipeline_of_another(tmp_path: Path) -> None:
    with pytest.raises(HdbError, match="no pipeline"):
        go_on_from(tmp_path, new_unet(), new_unet())
    unet = UNet2DConditionModel.from_pretrained(WEIGHTS / "unet")
    words = CLIPTextModel.from_pretrained(WEIGHTS / "text_encoder")
    fresh = UNet2DConditionModel.from_config(unet.config), CLIPTextModel(words.config)
    for mine, theirs in zip(fresh, (unet, words), strict=True):
        assert not same(mine, theirs)
    go_on_from(WEIGHTS, *fresh)
    for mine, theirs in zip(fresh, (unet, words), strict=True):
        assert same(mine, theirs)


def test_the_weights_that_ship_fit_the_networks_of_the_recipe() -> None:
    words = CLIPTextModel.from_pretrained(WEIGHTS / "text_encoder")
    unet = new_unet()
    go_on_from(WEIGHTS, unet, CLIPTextModel(words.config))
    assert same(unet, UNet2DConditionModel.from_pretrained(WEIGHTS / "unet"))
    vae, fresh = AutoencoderTiny.from_pretrained(WEIGHTS / "vae"), new_autoencoder()
    fresh.load_state_dict(vae.state_dict())


def same(a: nn.Module, b: nn.Module) -> bool:
    pairs = zip(a.state_dict().values(), b.state_dict().values(), strict=True)
    return all(torch.equal(x, y.to(x)) for x, y in pairs)


def test_the_last_step_of_the_schedule_is_pure_noise() -> None:
    scheduler = new_scheduler()
    assert scheduler.alphas_cumprod[-1] == 0
    assert scheduler.alphas_cumprod.diff().max() < 0
    scheduler.set_timesteps(4)
    assert scheduler.timesteps.tolist() == [999, 749, 499, 249]
    # A brightness that the noise does not have is drawn from there: x0 = -v at zero signal.
    noise, v = torch.zeros(1, 1, 2, 2), torch.full((1, 1, 2, 2), -0.7)
    drawn = scheduler.step(v, scheduler.timesteps[0], noise).denoised
    assert torch.allclose(drawn, torch.full_like(drawn, 0.7), atol=1e-6)


@pytest.fixture
def latents() -> Latents:
    """40 portraits of people, 10 of nobody, 90 pictures in other styles."""
    portrait, marble = STYLES.index("portrait"), STYLES.index("marble")
    styles = torch.tensor([portrait] * 50 + [marble] * 90)
    kinds = torch.tensor([KINDS.index("person")] * 40 + [KINDS.index("nobody")] * 100)
    return Latents(torch.zeros(2, 140, 1, 1, 1), styles, kinds)


def test_half_of_what_is_drawn_are_portraits(latents: Latents) -> None:
    pick = latents.draw(20_000, torch.Generator().manual_seed(0))
    portraits = pick < 50
    assert portraits.double().mean().item() == pytest.approx(0.5, abs=0.02)
    nobody = (pick[portraits] >= 40).double().mean().item()
    assert nobody == pytest.approx(15 / 55, abs=0.02)  # 10 that count 1.5 times, of 40 and those


def test_pictures_of_nobody_mostly_say_so(latents: Latents) -> None:
    generator = torch.Generator().manual_seed(0)
    nobody = torch.full((10_000,), 45)
    groups = latents.captions(nobody, generator)
    told = (groups == GROUPS.index("cinematic")).double().mean().item()
    assert told == pytest.approx(0.7, abs=0.02)
    assert set(groups.unique().tolist()) == {GROUPS.index("cinematic"), STYLES.index("portrait")}
    people, marble = torch.arange(40), torch.arange(50, 140)
    assert (latents.captions(people, generator) == STYLES.index("portrait")).all()
    assert (latents.captions(marble, generator) == STYLES.index("marble")).all()


def test_a_missing_teacher_is_said(tmp_path: Path) -> None:
    with pytest.raises(HdbError, match=r"taef2_encoder\.pth"):
        load_teacher(tmp_path)
