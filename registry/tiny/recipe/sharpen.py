"""Train the UNet of `tiny` further on what it draws itself: its last steps, seen as pictures.

A network that learned from noised photographs answers with the middle of what might be, which is
soft, and has never seen its own answers, which are what all steps but the first start from. So
photographs are noised, brought back in one to five steps as the base draws, and the last of these
is compared, decoded, as the decoder's windows are: with the photograph, and by the discriminator
(`decoder.pull`). The base does so half of the time by itself, and half of the time adapted to the
person by a prediction. As many samples have the plain loss of the base's training, which keeps the
rest of it where it is.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import AttnProcessor
from safetensors.torch import load_file
from torch import Tensor

from hdbcli.method.inject import eject
from hdbcli.model.base import load_predictor, open_base
from hdbcli.training.loop import Plan, Step, averaged, averages_of, fit, settle
from registry.stable_diffusion.backbone import StableDiffusion, shifted
from registry.tiny import SAMPLING
from registry.tiny.recipe.base import TIMES_SHIFT, prompt_of, show
from registry.tiny.recipe.decoder import (
    Discriminator,
    brought_back,
    hinge,
    portraits_of,
    pull,
    pulled,
)
from registry.tiny.recipe.latents import read_autoencoder, read_latents
from registry.tiny.recipe.photographs import read_photographs
from registry.tiny.recipe.pictures import half, to_unit

SHARPENED = 2  # of the steps of drawing, the last, which learn
ADAPTED = 0.5  # share of steps in which the base is adapted to the people it draws
WINDOW = 12  # latents of a window's side: most of a face
SHOWN_EVERY = 150  # steps


def train_sharper(build: Path, plan: Plan, batch: int, device: str) -> Iterator[Step]:
    """Train the UNet of `tiny` as it ships, seen through the decoder in `BUILD/vae` and by the
    discriminator of its training; resumable. Write a sheet now and then, `pipeline/` at the end."""
    pictures = read_photographs(build)
    pixels, side = pictures.pixels, pictures.pixels.shape[-1]
    latents = read_latents(build, side, device)
    base = open_base("tiny", device)
    (model, _), backbone = load_predictor(base), base.backbone
    assert isinstance(backbone, StableDiffusion)
    unet, vae = backbone.pipeline.unet, read_autoencoder(build).to(device)
    backbone.pipeline.register_modules(vae=vae)
    unet.to(memory_format=torch.channels_last)
    unet.set_attn_processor(AttnProcessor())
    torch.manual_seed(plan.seed)
    judge = Discriminator().to(device)
    learned = load_file(build / "decoder.safetensors")
    judge.load_state_dict({k: learned[f"average.judge.{k}"] for k in judge.state_dict()})
    drawing = {
        f"unet.{name.replace('.base.', '.')}": parameter.requires_grad_()
        for name, parameter in unet.named_parameters()
    }
    parameters = drawing | {f"judge.{k}": p for k, p in judge.named_parameters()}
    averages = averages_of(parameters)
    times = backbone.times(SAMPLING.steps)[:-1].float()

    def chosen(generator: torch.Generator) -> tuple[Tensor, list[str], Tensor]:
        """Choose latents, their prompts, and which pictures they are of."""
        pick = latents.draw(batch, generator)
        prompts = [prompt_of(group) for group in latents.captions(pick, generator)]
        return latents.values[0, pick].to(device).float(), prompts, pick

    def losses(generator: torch.Generator) -> Iterator[Tensor]:
        clean, prompts, pick = chosen(generator)
        theta = None
        if torch.rand((), generator=generator) < ADAPTED:
            portraits = pixels[portraits_of(pictures, pick, generator)].permute(0, 2, 3, 1)
            with torch.no_grad():
                theta = model(base.faces(list(portraits.numpy())))
        last = len(times) - int(torch.randint(SHARPENED, (), generator=generator))
        first = int(torch.randint(1, last, (), generator=generator))  # before is nothing but noise
        before, at_last = times[first : last - 1], times[last - 1 : last]
        with base.adapted(theta):  # in two casts, since one keeps weights that have no gradient
            with torch.no_grad(), half(torch.device(device)):
                clean = brought_back(backbone, clean, prompts, before, generator)
            with half(torch.device(device)):
                clean = brought_back(backbone, clean, prompts, at_last, generator)
        x, y = torch.randint(clean.shape[-1] - WINDOW + 1, (2,), generator=generator).tolist()
        with half(torch.device(device)):
            made = vae.decode(clean[:, :, y : y + WINDOW, x : x + WINDOW]).sample.float()
        true = pixels[pick, :, 8 * y : 8 * (y + WINDOW), 8 * x : 8 * (x + WINDOW)]
        true = to_unit(true.to(device))
        yield pulled(made, *pull(judge, made, true))
        yield hinge(judge(true), judge(made.detach()))
        clean, prompts, _ = chosen(generator)
        noise = torch.randn(clean.shape, generator=generator).to(device)
        share = torch.rand(batch, generator=generator)
        t = shifted(share, TIMES_SHIFT).clamp(max=1 - 2**-20).to(device)
        with half(torch.device(device)):
            answer = backbone.predict(clean, prompts, noise, t)
        yield F.mse_loss(answer.float(), backbone.target(clean, noise, t))

    optimizer = torch.optim.AdamW(
        parameters.values(), lr=plan.lr, weight_decay=0.0, betas=(0.5, 0.99), fused=True
    )
    file = build / "sharper.safetensors"
    for step in fit(parameters, losses, optimizer, plan, averages, file):
        yield step
        if step.number % SHOWN_EVERY == 0 or step.number == step.steps:
            with averaged(drawing, averages):
                show(backbone.pipeline, side, build)
    settle(drawing, averages)
    eject(base.backbone.components)
    backbone.pipeline.save_pretrained(build / "pipeline")
