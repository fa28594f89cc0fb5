"""Fast fine-tuning: a few dozen iterations of diffusion loss on the crops, from a predicted and
relaxed theta.

HyperDreamBooth §3.4; the paper takes 40 iterations on "a [V] face".
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hdbcli.base import PORTRAIT, Base
from hdbcli.config import RefineConfig, Tell
from hdbcli.device import autocast, make_optimizer
from hdbcli.lidb import Theta, pack, unpack
from registry.training import Plan, fit

PAIRS = 64  # (timestep, noise) pairs that the loss is reported on, the same before and after
PAIRS_SEED = 0


@dataclass(frozen=True)
class Refined:
    """What refinement made, and the loss before and after on the same 64 pairs."""

    theta: Theta
    loss_start: float
    loss_end: float
    optimizer: str
    note: str | None


def refine(base: Base, theta: Theta, images: Tensor, config: RefineConfig, tell: Tell) -> Refined:
    """Train theta of one identity on its crops `images` (N, 3, S, S) in -1..1."""
    latents = base.backbone.encode_images(images)
    prompt = base.prompt(PORTRAIT)
    flat = pack(theta).clone().requires_grad_(True)
    optimizer, label, note = make_optimizer(config.optimizer, [flat], config.lr)
    plan = Plan(config.steps, config.lr, warmup=3, decay=0.5, seed=config.seed)
    start = portrait_loss(base, theta, latents)

    def loss(generator: torch.Generator) -> Tensor:
        clean = latents[torch.arange(config.batch) % len(latents)]
        noise = torch.randn(clean.shape, generator=generator).to(clean)
        # One time in each of `batch` equal parts of the schedule: less noise in the gradient.
        part = torch.arange(config.batch) + torch.rand(config.batch, generator=generator)
        t = (part / config.batch).to(clean.device)
        base.injected.wear(unpack(flat, len(base.injected.layers), base.spec.a, base.spec.b))
        with autocast(base.device):
            return base.backbone.loss(clean, [prompt] * config.batch, noise, t).mean()

    with base.injected.wearing(None):
        for step in fit({"theta": flat}, loss, optimizer, plan):
            tell("refine", step.number, step.steps)
    refined = unpack(flat.detach(), len(base.injected.layers), base.spec.a, base.spec.b)
    return Refined(refined, start, portrait_loss(base, refined, latents), label, note)


@torch.no_grad()
def portrait_loss(base: Base, theta: Theta | None, latents: Tensor) -> float:
    """Return the diffusion loss of "a [V] face", the mean over 64 fixed (timestep, noise) pairs."""
    generator = torch.Generator().manual_seed(PAIRS_SEED)
    noise = torch.randn((PAIRS, *latents.shape[1:]), generator=generator).to(latents)
    t = ((torch.arange(PAIRS) + 0.5) / PAIRS)[torch.randperm(PAIRS, generator=generator)]
    clean = latents[torch.arange(PAIRS) % len(latents)]
    prompts = [base.prompt(PORTRAIT)] * 16
    total = 0.0
    with base.injected.wearing(theta), autocast(base.device):
        for part in torch.arange(PAIRS).split(16):
            where = t[part].to(latents.device)
            total += base.backbone.loss(clean[part], prompts, noise[part], where).sum().item()
    return total / PAIRS
