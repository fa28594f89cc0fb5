"""Train the hypernetwork of a base model: the diffusion loss of each person wearing the predicted
theta.

HyperDreamBooth §3.3, eq. 4, with beta = 0 (no bank of optimised LiDBs is needed). The face that is
read and the face that is drawn are different photos of a person where there are two, so that pose
and light are not taken for identity.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from hdbcli.base import PORTRAIT, Base
from hdbcli.config import PretrainConfig, Tell
from hdbcli.device import autocast, make_optimizer
from hdbcli.hypernet import HyperConfig, HyperNetwork
from hdbcli.people import People
from registry.training import Plan, Step, fit

AVERAGE = 0.998


def new_hypernetwork(base: Base, seed: int, rank: int = 1) -> HyperNetwork:
    """Build the untrained hypernetwork that fits a base."""
    injected = base.injected
    config = HyperConfig(
        targets=len(injected.layers),
        a=base.spec.a,
        b=base.spec.b,
        targets_digest=injected.targets_digest(),
        base=base.spec.name,
        basis_digest=injected.fingerprint().digest,
        rank=rank,
        resolution=base.spec.resolution,
        patch=base.spec.resolution // 8,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return HyperNetwork(config)


def pretrain(
    base: Base,
    model: HyperNetwork,
    people: People,
    config: PretrainConfig,
    checkpoint: Path | None,
    tell: Tell,
) -> Iterator[Step]:
    """Train `model` in place; at the end it holds the moving average of its weights."""
    device = base.device
    model.to(device).train()
    latents = encode_crops(base, people.crops, tell)
    images = torch.from_numpy(people.crops).permute(0, 3, 1, 2)
    prompts = [base.prompt(PORTRAIT)] * config.batch
    parameters = dict(model.named_parameters())
    averages = {name: p.detach().clone() for name, p in parameters.items()}
    optimizer, _, _ = make_optimizer(config.optimizer, parameters.values(), config.lr, 0.01)
    plan = Plan(config.steps, config.lr, warmup=100, average=AVERAGE, seed=config.seed)

    def loss(generator: torch.Generator) -> Tensor:
        read, drawn = draw_pairs(people.members, config.batch, generator)
        mirrored = torch.rand(config.batch, generator=generator) < 0.5
        clean = torch.where(mirrored.view(-1, 1, 1, 1), latents[1, drawn], latents[0, drawn])
        faces = images[read].float().to(device) / 127.5 - 1
        faces = torch.where(mirrored.view(-1, 1, 1, 1).to(device), faces.flip(-1), faces)
        noise = torch.randn(clean.shape, generator=generator)
        t = torch.rand(config.batch, generator=generator)
        with autocast(device):
            base.injected.wear(model(faces))
            clean, noise, t = clean.float().to(device), noise.to(device), t.to(device)
            return base.backbone.loss(clean, prompts, noise, t).mean()

    with base.injected.wearing(None):
        yield from fit(parameters, loss, optimizer, plan, averages, checkpoint)
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(averages[name])
    model.eval()


def draw_pairs(
    members: tuple[tuple[int, ...], ...], count: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Draw `count` people and two photos of each, different where there are two: (read, drawn)."""
    read, drawn = [], []
    for person in torch.randint(len(members), (count,), generator=generator).tolist():
        photos = members[person]
        first = int(torch.randint(len(photos), (), generator=generator))
        step = int(torch.randint(1, max(2, len(photos)), (), generator=generator))
        read.append(photos[first])
        drawn.append(photos[(first + step) % len(photos)])
    return torch.tensor(read), torch.tensor(drawn)


@torch.no_grad()
def encode_crops(base: Base, crops: np.ndarray, tell: Tell) -> Tensor:
    """Encode crops and their mirror images once: (2, N, c, h, w) float16 on the CPU."""
    both = []
    for side in range(2):
        parts = []
        for start in range(0, len(crops), 100):
            batch = base.images(list(crops[start : start + 100]))
            batch = batch.flip(-1) if side else batch
            with autocast(base.device):
                parts.append(base.backbone.encode_images(batch).half().cpu())
            tell("encode", side * len(crops) + start, 2 * len(crops))
        both.append(torch.cat(parts))
    return torch.stack(both)
