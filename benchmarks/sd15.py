"""Benchmarks at the true size of Stable Diffusion 1.5: weights are random, which changes no second
and no byte.

Each method learns one person in a process of its own, from loading on; all of them one sample a
step, 512 px, in bfloat16 with gradient checkpointing, DreamBooth one more of its class.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
from collections.abc import Generator, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from hdbcli.bench.harness import Row, hdb, measured, paired, random_identity, scratch
from hdbcli.bench.random_model import write_random
from hdbcli.compare.methods import METHODS
from hdbcli.compare.timing import Rounds, time_alone
from hdbcli.config import PORTRAIT, UNPREDICTED_STEPS, RefineConfig
from hdbcli.method.hypernet import HyperNetwork
from hdbcli.method.lidb import Theta
from hdbcli.model.base import Base, load_base
from hdbcli.model.device import autocast
from hdbcli.model.memory import PLANS, MemoryPlan
from hdbcli.model.sample import generate
from hdbcli.training.hypernetwork import new_hypernetwork
from hdbcli.training.questions import diffusion_loss
from hdbcli.training.refine import train, trainable_lidb
from registry import store
from registry.plugins import load_registry
from registry.spec import SampleSettings

NAME = "sd15"
ROUNDS = Rounds(warm_up=2, timed=6)
FEW = Rounds(warm_up=1, timed=3)  # a step of DreamBooth takes half a minute
PLAN = {plan.name: plan for plan in PLANS}
STOCK = """
import sys, torch
from diffusers import StableDiffusionPipeline
pipe = StableDiffusionPipeline.from_pretrained(sys.argv[1], torch_dtype=torch.float32)
pipe.set_progress_bar_config(disable=True)
pipe("a sks face", num_inference_steps=2, guidance_scale=3.0).images[0].save(sys.argv[2])
"""


def run(*_: object) -> Iterator[Row]:
    """Build the checkpoint, and measure everything on it; it goes away at the end."""
    with scratch() as folder:
        file = folder / "sd15.safetensors"
        write_random("sd1", file)
        os.sync()  # or the first to be measured pays for the writing
        hdb("base", "add", NAME, str(file))
        random_identity(NAME, "someone")
        size = store.path_of("someone").stat().st_size
        yield Row("identity of rank 4 as int8", size, "bytes", below=120_000)
        yield Row("checkpoint in fp16 / identity", file.stat().st_size / size, "x", above=1e4)
        for part in (_methods, _overhead, partial(_command, folder)):
            yield from part()


def _methods() -> list[Row]:
    """Seconds and memory of one person, method by method."""
    crop = np.random.default_rng(0).integers(0, 256, (512, 512, 3), np.uint8)
    dreambooth = replace(METHODS["dreambooth"], class_pictures=1)
    runs = {
        "hdb": (METHODS["hyperdreambooth"], "recompute"),
        "hdb, nf4 weights": (METHODS["hyperdreambooth"], "nf4"),
        "LoRA DreamBooth": (METHODS["lora"], "recompute"),
        "Textual Inversion": (METHODS["inversion"], "recompute"),
        "DreamBooth, AdamW8bit": (replace(dreambooth, optimizer="adamw8bit"), "recompute"),
        "DreamBooth, AdamW": (dreambooth, "recompute"),
    }
    alone = {
        name: time_alone(
            method,
            partial(_load, PLAN[plan]),
            crop,
            1,
            FEW if name.startswith("DreamBooth") else ROUNDS,
        )
        for name, (method, plan) in runs.items()
    }
    rows = []
    for name, (method, _) in runs.items():
        each = alone[name]
        rows += [
            Row(f"{name}: a step", each.step, "s"),
            Row(f"{name}: {method.steps} steps", method.steps * each.step, "s"),
            Row(f"{name}: peak memory", each.memory / 1e9, "GB", 5 if name == "hdb" else None),
        ]
    # What `hdb new` takes on a base without a hypernetwork.
    unpredicted = UNPREDICTED_STEPS * alone["hdb"].step
    rows.append(Row(f"hdb without hypernetwork: {UNPREDICTED_STEPS} steps", unpredicted, "s"))
    saved = (alone["hdb"].memory - alone["hdb, nf4 weights"].memory) / 1e9
    rows.append(Row("hdb: memory that nf4 weights save", saved, "GB", above=0.4))
    mine, steps = alone["hdb"], RefineConfig.steps
    whole = mine.startup + mine.seconds(steps)
    for name, promised in (
        ("DreamBooth, AdamW", 25),
        ("DreamBooth, AdamW8bit", None),
        ("Textual Inversion", 100),
        ("LoRA DreamBooth", None),
    ):
        method, other = runs[name][0], alone[name]
        training = method.steps * other.step
        ratio = (other.startup + training) / whole
        # What DreamBooth's class pictures take is left out: it would flatter hdb.
        rows += [
            Row(f"{name} / hdb, training alone", training / (steps * mine.step), "x"),
            Row(f"{name} / hdb without hypernetwork, likewise", training / unpredicted, "x"),
            Row(
                f"{name} / hdb, with loading",
                ratio,
                "x",
                above=promised,
            ),
        ]
    return rows


def _overhead() -> list[Row]:
    """What the residuals cost, in training and in drawing, against the bare model."""
    base, _ = _load(PLAN["recompute"])
    side = base.spec.resolution // 8
    latents = torch.randn(1, 4, side, side)
    theta = base.first_theta(rank=4)
    config = RefineConfig(steps=1000, batch=1)
    trainable = trainable_lidb(base, theta)
    steps = train(base, trainable, [latents], config)
    learning = paired(lambda: next(steps), lambda: _bare(base, latents), rounds=5)
    assert isinstance(steps, Generator)
    steps.close()
    settings = SampleSettings(steps=4)

    def draw(adapter: Theta | None) -> None:
        generate(base, adapter, PORTRAIT, [0], settings, lambda *_: None)

    drawing = paired(lambda: draw(theta), lambda: draw(None), rounds=3)
    return [
        Row("an iteration / the bare model forward and back", learning, "x", below=1.15),
        Row("drawing with an identity / without", drawing, "x", below=1.05),
        Row("two people in a batch, furthest from one by one", _apart(base), "", below=1e-2),
    ]


def _bare(base: Base, latents: Tensor) -> None:
    """Go forward and back through the frozen networks, with gradients to their activations."""
    encoder = base.backbone.components["text_encoder"]
    embedding = encoder.get_input_embeddings()  # type: ignore[operator]
    assert isinstance(embedding, nn.Module)
    handle = embedding.register_forward_hook(lambda _m, _i, out: out.requires_grad_(True))
    noise, t = torch.randn_like(latents), torch.full((1,), 0.7)
    try:
        with autocast(base.device):
            leaf = latents.clone().requires_grad_(True)
            diffusion_loss(base.backbone, leaf, [base.prompt(PORTRAIT)], noise, t).mean().backward()
    finally:
        handle.remove()


@torch.no_grad()
def _apart(base: Base) -> float:
    """Return the largest difference of losses between a batch of two people and one by one."""
    first = base.first_theta(rank=4, people=2)
    generator = torch.Generator().manual_seed(0)
    both = Theta(first.down, torch.randn(first.up.shape, generator=generator) * 0.1)
    side = base.spec.resolution // 8
    latents = torch.randn((2, 4, side, side), generator=generator)
    noise, t = torch.randn(latents.shape, generator=generator), torch.full((2,), 0.7)
    prompts = [base.prompt(PORTRAIT)] * 2

    def losses(part: slice) -> Tensor:
        with base.adapted(both[part]):
            return diffusion_loss(base.backbone, latents[part], prompts[part], noise[part], t[part])

    alone = torch.cat([losses(slice(0, 1)), losses(slice(1, 2))])
    assert (alone[0] - alone[1]).abs() > 0  # two people differ
    return float((losses(slice(0, 2)) - alone).abs().max())


def _command(folder: Path) -> list[Row]:
    """`hdb gen` against a script that loads the pipeline with diffusers and draws."""
    hdb("merge", "someone=0", "--out", str(folder / "folder"))
    hdb("base", "add", f"{NAME}-folder", str(folder / "folder"))
    script, picture = folder / "stock.py", folder / "stock.png"
    script.write_text(STOCK)
    more = []
    for _ in range(3):
        plain, _ = measured([sys.executable, str(script), str(folder / "folder"), str(picture)])
        words = ("someone", PORTRAIT, "--steps", "2", "-n", "1", "-o", str(folder / "p.png"))
        here = ("--base", f"{NAME}-folder", "--memory", "normal")
        mine, _ = hdb("gen", *words, *here)
        more.append(mine - plain)
    subprocess.run(["rm", "-rf", str(folder / "folder")], check=True)
    return [Row("hdb gen, beyond loading and drawing", statistics.median(more), "s", below=2)]


def _load(plan: MemoryPlan) -> tuple[Base, HyperNetwork]:
    base = load_base(load_registry().get(NAME), "cpu", plan)
    return base, new_hypernetwork(base, 0).eval()
