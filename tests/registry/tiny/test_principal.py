"""The closed-form autoencoder: the encoder projects, the decoder inverts, and the checkerboard is
why."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from diffusers import AutoencoderTiny
from torch import Tensor

from registry.tiny.recipe.autoencoder import CHANNELS, SCALE, new_autoencoder
from registry.tiny.recipe.principal import PATCH, Components, components


@pytest.fixture(scope="module")
def pictures() -> Tensor:
    """Smooth random pictures, uint8 (96, 3, 128, 128), whose patches have few strong components."""
    noise = torch.rand(96, 3, 20, 20, generator=torch.Generator().manual_seed(0))
    smooth = F.interpolate(noise, (128, 128), mode="bicubic").clamp(0, 1)
    return (smooth * 255).round().to(torch.uint8)


@pytest.fixture(scope="module")
def parts(pictures: Tensor) -> Components:
    return components(pictures / 255, CHANNELS, 0.5, SCALE)


@pytest.fixture
def model(pictures: Tensor) -> AutoencoderTiny:
    torch.manual_seed(0)
    return new_autoencoder(pictures).eval()


def restored(parts: Components, latents: Tensor) -> Tensor:
    """Put patches back by matrix product and F.fold: what the decoder must equal."""
    rows, columns = latents.shape[2:]
    bent = torch.tanh(latents / 3) * 3  # AutoencoderTiny's own clamp
    patches = parts.restore @ bent.flatten(2) + parts.mean[:, None]
    return F.fold(patches, (PATCH * rows, PATCH * columns), PATCH, stride=PATCH).clamp(min=0)


@torch.no_grad()
def test_the_encoder_projects_patches(
    model: AutoencoderTiny, parts: Components, pictures: Tensor
) -> None:
    images = pictures[:8] / 255
    latents = model.encode(images * 2 - 1).latents
    patches = F.unfold(images, PATCH, stride=PATCH) - parts.mean[:, None]
    expected = (parts.project @ patches).view_as(latents)
    assert (latents - expected).abs().max() < 1e-4 * expected.abs().max()
    everything = model.encode(pictures / 127.5 - 1).latents * SCALE
    assert everything.pow(2).mean().item() == pytest.approx(1, abs=0.01)


@torch.no_grad()
@pytest.mark.parametrize("cells", [1, 8, 16])
def test_the_decoder_inverts_it(model: AutoencoderTiny, parts: Components, cells: int) -> None:
    noise = torch.randn(2, CHANNELS, cells, cells, generator=torch.Generator().manual_seed(1))
    latents = noise * parts.spread.view(1, -1, 1, 1)
    decoded = (model.decode(latents).sample + 1) / 2
    expected = restored(parts, latents)
    assert expected.std() > 0.1
    assert (decoded - expected).abs().mean() < 0.01 * expected.std()


@torch.no_grad()
def test_without_its_checkerboard_it_cannot(model: AutoencoderTiny, parts: Components) -> None:
    noise = torch.randn(2, CHANNELS, 8, 8, generator=torch.Generator().manual_seed(1))
    latents = noise * parts.spread.view(1, -1, 1, 1)
    for block in [layer for layer in model.decoder.layers if hasattr(layer, "conv")][:5]:
        block.conv[4].bias.zero_()  # where the board grows
    decoded = (model.decode(latents).sample + 1) / 2
    expected = restored(parts, latents)
    assert (decoded - expected).abs().mean() > 0.3 * expected.std()


@torch.no_grad()
def test_what_is_kept_is_most_of_a_picture(model: AutoencoderTiny, pictures: Tensor) -> None:
    images = pictures[:8] / 127.5 - 1
    back = model.decode(model.encode(images).latents).sample
    error, plain = (back - images).pow(2).mean(), (images.mean() - images).pow(2).mean()
    assert error < 0.05 * plain


def test_no_linear_code_of_as_many_numbers_keeps_more(parts: Components, pictures: Tensor) -> None:
    patches = F.unfold(pictures / 255, PATCH, stride=PATCH).transpose(1, 2).reshape(-1, 192)
    back = (patches - parts.mean) @ parts.project.T @ parts.restore.T + parts.mean
    lost = (back - patches).pow(2).sum(1).mean()
    rest = torch.linalg.eigvalsh(torch.cov(patches.T)).flip(0)[CHANNELS:].sum()
    torch.testing.assert_close(lost, rest, rtol=0.01, atol=1e-5)
    assert rest > 0.01 * patches.var(0).sum()  # something is lost: the test is about something
