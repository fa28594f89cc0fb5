"""The check of a device: does hdb do there what it does on the CPU, how fast, in how much memory?

What `make gpu-check` runs on a GPU, and the tests on the CPU itself.
"""

from __future__ import annotations

import math
import statistics
from functools import partial

import numpy as np
import torch
from torch import Tensor

from hdbcli.bench.harness import Row, hdb, scratch, timed
from hdbcli.bench.random_model import write_random
from hdbcli.compare.timing import step_seconds
from hdbcli.config import PORTRAIT, RefineConfig
from hdbcli.method.lidb import Theta
from hdbcli.model.base import Base, load_base, load_predictor
from hdbcli.model.device import choose_device, wait_for
from hdbcli.model.memory import PLANS
from hdbcli.model.sample import generate
from hdbcli.training.refine import optimizer_of, portrait_loss, refine, train, trainable_lidb
from registry.plugins import load_registry
from registry.spec import BaseSpec, SampleSettings

BASE = "tiny"
STEPS = 6
LOSSES = ("loss", "loss after refinement", "loss after refinement for likeness")


def run(*_: object) -> list[Row]:
    """Check the fastest device there is, at the true size of Stable Diffusion 1.5 too."""
    device = choose_device(None)
    rows = agreement(device)
    with scratch() as folder:
        write_random("sd1", folder / "sd15.safetensors")
        hdb("base", "add", "sd15", str(folder / "sd15.safetensors"))
        return rows + speeds(load_registry().get("sd15"), device)


def agreement(device: str) -> list[Row]:
    """Compare prediction, loss, refinement and pictures with the CPU's."""
    there, here = (load_base(load_registry().get(BASE), each) for each in (device, "cpu"))
    side = here.spec.resolution
    crop = np.random.default_rng(0).integers(0, 256, (side, side, 3), np.uint8)
    found = [_results(base, crop) for base in (there, here)]
    (theta, *losses, picture), (theta_cpu, *losses_cpu, picture_cpu) = found
    error = float(((picture.astype(float) - picture_cpu) ** 2).mean())
    core, core_cpu = (each.up[0] @ each.down[0] for each in (theta, theta_cpu))
    return [
        Row(f"prediction on {device}, off the CPU's", _off(core, core_cpu), "", below=0.05),
        *(
            Row(f"{name} on {device}, off the CPU's", abs(one / other - 1), "", below=0.01)
            for name, one, other in zip(LOSSES, losses, losses_cpu, strict=True)
        ),
        Row("picture, PSNR", 10 * math.log10(255**2 / max(error, 1e-6)), "dB", above=25),
    ]


def _results(base: Base, crop: np.ndarray) -> tuple[Theta, float, float, float, np.ndarray]:
    face = base.faces([crop])
    theta = load_predictor(base)[0].predict(face)
    latents = [face.latents]
    config = RefineConfig(steps=STEPS, rank=1)
    loss = float(portrait_loss(base, theta, latents))
    plain, alike = (
        float(refine(base, theta, latents, config, lambda *_: None, faces).loss_end)
        for faces in (None, [face])
    )
    drawn = generate(base, theta, PORTRAIT, [0], base.spec.sampling, lambda *_: None)
    return Theta(theta.down.cpu(), theta.up.cpu()), loss, plain, alike, drawn[0].image


def speeds(spec: BaseSpec, device: str) -> list[Row]:
    """Return seconds of a refinement step and of a picture, and peak memory, plan by plan."""
    rows = []
    for plan in PLANS:
        _reset(device)
        base = load_base(spec, device, plan)
        latents = [torch.zeros(1, *base.latent_shape, device=device)]
        base.free_autoencoder()
        cores = ((len(base.injected.layers), 4, spec.a), (len(base.injected.layers), spec.b, 4))
        down, up = (0.01 * torch.randn((1, *shape), device=device) for shape in cores)
        trainable = trainable_lidb(base, Theta(down, up))
        config = RefineConfig(steps=STEPS)
        optimizer, label = optimizer_of(trainable, config)
        steps = train(base, trainable, latents, config, optimizer)
        step = statistics.median(step_seconds(steps, partial(wait_for, device))[2:])
        rows.append(Row(f"{spec.name}, plan {plan.name}, {label}: a step", step, "s"))
        settings = SampleSettings(steps=STEPS)
        draw = partial(
            generate, base, trainable.adapter(), PORTRAIT, [0], settings, lambda *_: None
        )
        drawn = timed(draw)
        rows.append(Row(f"{spec.name}, plan {plan.name}: a picture of {STEPS} steps", drawn, "s"))
        if device.startswith("cuda"):
            peak = torch.cuda.max_memory_allocated(device) / 1e9
            rows.append(Row(f"{spec.name}, plan {plan.name}: peak memory", peak, "GB"))
        del base, trainable, optimizer
    return rows


def _off(one: Tensor, other: Tensor) -> float:
    return float((one - other).norm() / other.norm())


def _reset(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
