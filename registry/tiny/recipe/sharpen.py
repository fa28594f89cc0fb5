"""Train `tiny` further on what it draws itself, seen as pictures: UNet, decoder and hypernetwork
together.

A network that learned from noised photographs answers with the middle of what might be, which is
soft, and has never seen its own answers, which are what all steps but the first start from. So
pictures are drawn here as the base draws them, from nothing but noise or from a photograph with
noise on it, up to one of the later steps, and what that makes of them is decoded and pulled in
three ways (`decoder.pull`): towards the photograph, the less of it was left; by the discriminator,
towards photographs of this style; and, where the base is adapted to a person by a prediction,
towards their face, as a recogniser sees it (`alike`). That gradient reaches the hypernetwork too.
So who is drawn and how well it is drawn are learned at once: the likeness loss alone draws people
in a haze, and a base that learned without people is no use to them.

As many samples have the plain loss of the base's training, which keeps the rest of it where it is.
Where the base is adapted, prompts that do not name the person are answered as by the base alone
(prior preservation); and that one has the plain loss too, or it would become whatever predictions,
which learn faster, make good again: after 300 steps its faces were orange shadows, and pictures of
people as clear as ever.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from diffusers.models.attention_processor import AttnProcessor
from torch import Tensor

from hdbcli.config import PretrainConfig
from hdbcli.method.hypernet import Faces
from hdbcli.method.inject import eject
from hdbcli.method.lidb import Theta
from hdbcli.model.base import load_predictor, open_base
from hdbcli.model.hypernetwork_file import save_hypernetwork
from hdbcli.training.loop import Plan, Step, averaged, averages_of, fit, settle
from hdbcli.training.questions import Samples, diffusion, distance
from registry.spec import NOISIEST
from registry.stable_diffusion.backbone import StableDiffusion
from registry.tiny import SAMPLING
from registry.tiny.recipe.base import noise_and_times, prompt_of, show
from registry.tiny.recipe.decoder import (
    Discriminator,
    alike,
    brought_back,
    hinge,
    portraits_of,
    pull,
    pulled,
)
from registry.tiny.recipe.latents import read_autoencoder, read_latents
from registry.tiny.recipe.photographs import read_photographs
from registry.tiny.recipe.pictures import as_images, half

UNSEEN = 2  # steps of drawing, the first, whose answers are still too open to be pictures
ADAPTED = 0.6  # share of steps in which the base is adapted to the people it draws
FREE = 0.5  # share of steps that draw from nothing but noise
LEFT = 3.0  # times the share of a photograph that noise has left: how hard that pulls, at most once
DRAWN = 40.0  # how much more what is drawn weighs for the people: likeness as much as it is, about
FASTER = 6.0  # times the rate of the UNet, that of the discriminator and of the hypernetwork
SHOWN_EVERY = 150  # steps
MIRRORED = [1, 0, 2, 4, 3]  # the five points of a face in a mirror: left and right change


def train_sharper(build: Path, plan: Plan, batch: int, device: str) -> Iterator[Step]:
    """Train the UNet, the decoder and the hypernetwork of `tiny` as they ship; resumable. Write a
    sheet now and then, `pipeline/`, `vae/` and `hypernetwork.safetensors` at the end."""
    pictures = read_photographs(build)
    pixels, side = pictures.pixels, pictures.pixels.shape[-1]
    latents = read_latents(build, side, device)
    base = open_base("tiny", device)
    (model, _), backbone = load_predictor(base), base.backbone
    assert isinstance(backbone, StableDiffusion)
    pipeline, where = backbone.pipeline, torch.device(device)
    unet, vae = pipeline.unet, read_autoencoder(build).to(where)
    vae.decoder.load_state_dict(pipeline.vae.decoder.state_dict())
    pipeline.register_modules(vae=vae)
    unet.to(memory_format=torch.channels_last)
    unet.set_attn_processor(AttnProcessor())
    torch.manual_seed(plan.seed)
    judge, model = Discriminator().to(where), model.requires_grad_().train()
    drawing = {
        f"unet.{name.replace('.base.', '.')}": parameter.requires_grad_()
        for name, parameter in unet.named_parameters()
    }
    drawing |= {f"decoder.{k}": p.requires_grad_() for k, p in vae.decoder.named_parameters()}
    people = {f"hypernetwork.{k}": p for k, p in model.named_parameters()}
    kept = drawing | people
    parameters = kept | {f"judge.{k}": p for k, p in judge.named_parameters()}
    averages = averages_of(parameters)
    times = backbone.times(SAMPLING.steps).float().clamp(max=NOISIEST)

    def losses(generator: torch.Generator) -> Iterator[Tensor]:
        """Yield the pulls at what is drawn, the discriminator's loss, and what holds the rest."""

        def chance() -> float:
            return float(torch.rand((), generator=generator))

        pick, turned = latents.draw(batch, generator), int(chance() < 0.5)

        def chosen(rows: Tensor) -> tuple[Tensor, Tensor]:
            """Return pictures and their latents, mirrored or not."""
            own = pixels[rows].flip(-1) if turned else pixels[rows]
            return as_images(own).to(where), latents.values[turned, rows].to(where).float()

        true, clean = chosen(pick)
        styles = pictures.styles[pick].to(where)
        theta = leaf = None
        groups = styles
        if chance() < ADAPTED:
            crops, read = chosen(portraits_of(pictures, pick, generator))
            with torch.no_grad():
                traits = base.embed(crops)
            theta = model(Faces(crops, traits, read))
            leaf = theta.as_leaves()
        else:
            groups = latents.captions(pick, generator)
        prompts = [prompt_of(group) for group in groups.tolist()]

        last = UNSEEN + int(chance() * (len(times) - UNSEEN))
        first = 0 if chance() < FREE else 1 + int(chance() * last)
        with base.adapted(leaf):  # in two casts, since one keeps weights that have no gradient
            with torch.no_grad(), half(where):
                drawn = brought_back(backbone, clean, prompts, times[first:last], generator)
            with half(where):
                drawn = brought_back(backbone, drawn, prompts, times[last : last + 1], generator)
        with half(where):
            made = vae.decode(drawn).sample.float()
        places = pictures.points[pick].numpy() / side
        if turned:
            places = (places * [-1, 1] + [1, 0])[:, MIRRORED]
        person = None
        if leaf is not None:
            person = alike(true, places, made, styles, free=first == 0)
        left = min(1.0, LEFT * (1 - float(times[first])))
        yield pulled(made, *pull(judge, made, true, styles, left, person))
        if leaf is not None:
            for core in (leaf.down, leaf.up):
                assert core.grad is not None
                core.grad *= DRAWN
        yield hinge(judge(true, styles), judge(made.detach(), styles))

        def asked(
            clean: Tensor, prompts: list[str], adapter: Theta | None, held: bool = False
        ) -> Tensor:
            samples = Samples(clean, prompts, *noise_and_times(clean, generator))
            question = diffusion(backbone, samples)
            if held:
                with torch.no_grad(), base.adapted(None), half(where):
                    question = distance(samples, backbone.predict(*samples))
            with base.adapted(adapter), half(where):
                return question.answered(backbone).mean()

        yield asked(clean, prompts, leaf)
        if theta is None or leaf is None:
            return
        some = slice(0, -(-batch // 2))
        others = [prompt.replace(f"{base.spec.identifier} ", "") for prompt in prompts[some]]
        yield PretrainConfig.prior * asked(clean.roll(1, 0)[some], others, leaf[some], held=True)
        theta.backward(leaf)
        alone = [prompt_of(group) for group in latents.captions(pick, generator)[some].tolist()]
        yield asked(clean[some], alone, None)

    slow: dict[str, Any] = {"params": list(drawing.values())}
    fast = {"params": [*people.values(), *judge.parameters()], "times": FASTER}
    optimizer = torch.optim.AdamW(
        [slow, fast],
        lr=plan.lr,
        weight_decay=0.0,
        betas=(0.5, 0.99),
        fused=True,
    )
    file = build / "sharper.safetensors"
    for step in fit(parameters, losses, optimizer, plan, averages, file):
        yield step
        if step.number % SHOWN_EVERY == 0 or step.number == step.steps:
            with averaged(kept, averages):
                show(pipeline, side, build)
    settle(kept, averages)
    eject(base.backbone.components)
    pipeline.save_pretrained(build / "pipeline")
    vae.save_pretrained(build / "vae")
    save_hypernetwork(model, build / "hypernetwork.safetensors")
