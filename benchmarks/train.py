"""What training a hypernetwork costs at true size: arithmetic of a step, seconds, memory, and hours
on known cards.

Arithmetic is counted, not measured: torch's counter of floating-point operations runs the networks
without memory for their weights. A person of a batch is DRAWS samples forward and back; one in
`share` is DRAWS more, once without and once with gradients. Backward through frozen weights costs
as much as forward, since there are gradients to activations only.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from functools import partial
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from hdbcli.bench.harness import Row, hdb, scratch
from hdbcli.bench.random_model import empty_networks, write_random
from hdbcli.compare.timing import step_seconds
from hdbcli.config import PretrainConfig
from hdbcli.model.base import Base, load_base
from hdbcli.model.device import ALONE, choose_device, peak_memory, wait_for
from hdbcli.model.memory import PLANS, Work, choose
from hdbcli.training.hypernetwork import new_hypernetwork, pretrain, share_out
from hdbcli.training.objective import DRAWS
from hdbcli.training.people import People
from registry.plugins import load_registry
from registry.stable_diffusion.families import FAMILIES, Family

# Dense bfloat16 with float32 sums, by the makers' data sheets, in TFLOP a second.
CARDS = {"RTX 4090": 165.0, "A100 80 GB": 312.0, "H100 SXM": 989.0}
REACHED = 0.35  # share of it that diffusion models of this size reach in training: an assumption
TRUE_SIZE = {"sd1": ("SD 1.5", 512), "sdxl": ("SDXL", 1024)}
STEPS = 3
LONG = 60.0  # seconds of a step after which no other is taken: warming up takes few of them
TOKENS = 77


def run(*_: object) -> Iterator[Row]:
    """Count, estimate, and then measure a few steps of each family at its true size."""
    for name, (title, side) in TRUE_SIZE.items():
        each = person_flops(FAMILIES[name], side)
        recomputed = person_flops(FAMILIES[name], side, recompute=True)
        yield Row(f"{title}: a person of a batch", each / 1e12, "TFLOP")
        yield Row(f"{title}: likewise, with --memory recompute", recomputed / 1e12, "TFLOP")
        whole = each * PretrainConfig.batch * PretrainConfig.steps
        for card, peak in CARDS.items():
            hours = whole / (peak * 1e12 * REACHED) / 3600
            yield Row(
                f"{title}: {PretrainConfig.steps} steps of {PretrainConfig.batch} on one {card}, "
                f"estimated at {REACHED:.0%} of {peak:.0f} TFLOP/s",
                hours,
                "h",
            )
    for name, sizes in TRUE_SIZE.items():
        yield from _measured(name, sizes[0])


def person_flops(family: Family, side: int, recompute: bool = False) -> float:
    """Return the floating-point operations that one person adds to a step, at `side` pixels."""
    forward = sample_flops(family, side)
    trained = 3 if recompute else 2  # forward, back, and forward once more
    return DRAWS * forward * (trained + (1 + trained) / PretrainConfig.share)


def step_flops(family: Family, side: int, batch: int, recompute: bool) -> float:
    """Return those of a step, in which at least one person is asked about others."""
    trained = 3 if recompute else 2
    served, _ = share_out(batch, ALONE, PretrainConfig.share)
    return DRAWS * sample_flops(family, side) * (batch * trained + served * (1 + trained))


def sample_flops(family: Family, side: int) -> float:
    """Return those of one sample through text encoders and UNet, forward only."""
    networks = empty_networks(family)
    unet = networks["unet"]
    config: Any = unet.config
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        words = torch.zeros((1, TOKENS), dtype=torch.long)
        for component, network in networks.items():
            if component.startswith("text_encoder"):
                network(words)
        grid = side // 8
        added = {}
        if family.double:
            width = config.projection_class_embeddings_input_dim
            width -= 6 * config.addition_time_embed_dim
            added = {"text_embeds": torch.zeros(1, width), "time_ids": torch.zeros(1, 6)}
        unet(
            torch.zeros(1, config.in_channels, grid, grid),
            torch.zeros(1),
            torch.zeros(1, TOKENS, config.cross_attention_dim),
            added_cond_kwargs=added,
        )
    return float(counter.get_total_flops())


def _measured(family: str, title: str) -> Iterator[Row]:
    """Train a few steps at true size, on random weights and people who do not exist."""
    device = choose_device(None)
    with scratch() as folder:
        write_random(family, folder / "base.safetensors")
        hdb("base", "add", "true-size", str(folder / "base.safetensors"))
        spec = load_registry().get("true-size")
        batch = PretrainConfig.batch if device.startswith("cuda") else 1
        work = Work(batch * DRAWS, spec.resolution, trains=True, exact=True, least=DRAWS)
        plan = choose(spec, device, "auto", work).plan
        plan = plan if device.startswith("cuda") else PLANS[2]  # what fits into any machine
        flops = step_flops(FAMILIES[family], spec.resolution, batch, plan.recompute)
        yield from measure(load_base(spec, device, plan), batch, title, flops)


def measure(base: Base, batch: int, title: str, flops: float) -> Iterator[Row]:
    """Return seconds a step, samples a second, peak memory, and TFLOP a second of a training.

    A step's `flops` are given: to count them while it is taken keeps what was recomputed until the
    step ends, as much memory again as the pass takes.
    """
    config = PretrainConfig(steps=STEPS, batch=batch)
    model = new_hypernetwork(base, 0)
    steps = pretrain(base, model, _random_people(base), config, lambda *_: None)
    done, used = partial(wait_for, base.device), time.process_time()
    (first,) = step_seconds(islice(steps, 1), done)  # warms up
    more = [] if first > LONG else step_seconds(steps, done)
    used = (time.process_time() - used) / (1 + len(more))
    seconds = statistics.median(more or [first])
    plan = f"plan {base.plan.name}, batch {batch}"
    yield Row(f"{title}, {plan}: a step", seconds, "s")
    if base.device == "cpu":  # which other work on the machine does not lengthen
        yield Row(f"{title}, {plan}: a step, processors' time", used, "s")
    yield Row(f"{title}, {plan}: samples a second", batch * DRAWS / seconds, "1/s")
    yield Row(f"{title}, {plan}: peak memory", peak_memory(base.device) / 1e9, "GB")
    yield Row(f"{title}, {plan}: reached", flops / seconds / 1e12, "TFLOP/s")


def _random_people(base: Base) -> People:
    """Return four people who do not exist, in memory: noise, which costs as much as faces."""
    count, side = 4, base.spec.resolution
    generator = np.random.default_rng(0)
    latents = generator.standard_normal((count, 2, *base.latent_shape), np.float32)
    return People(
        generator.integers(0, 256, (count, side, side, 3), np.uint8),
        tuple("abcd"),
        tuple((k,) for k in range(count)),
        styled=((),) * count,
        traits=generator.standard_normal((count, 128), np.float32),
        latents=latents.astype(np.float16),
    )
