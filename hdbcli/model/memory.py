"""Fit a run into the memory there is: plans from generous to frugal, the first that fits, and one
step down where it did not.

A plan is data, and so is the estimate behind the choice: the base's size comes from the headers of
its files, before anything is loaded. Attention is never cut in slices: torch's fused kernels keep
no matrix of all pairs on any device. Nor is there an optimizer here: 8 bits are the default.
"""

from __future__ import annotations

import gc
import math
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TypeVar

import torch

from hdbcli.config import MEMORIES
from hdbcli.limits import free_ram
from hdbcli.model.device import has_bf16
from registry.checkpoints.contents import read_checkpoint
from registry.errors import HdbError, UsageError
from registry.spec import BaseSpec
from registry.stable_diffusion.loading import out_of_memory

T = TypeVar("T")


@dataclass(frozen=True)
class MemoryPlan:
    """How a base is held and worked on."""

    name: str
    dtype: str = "float32"  # of the weights, as they are loaded
    quantised: str | None = None  # the base's linear layers and the face encoder's: int8 or nf4
    recompute: bool = False  # gradient checkpointing
    at_once: int | None = None  # samples in one pass, or the fewest there can be; None: all
    frugal: bool = False  # the autoencoder is let go of while training, and decodes in tiles


NORMAL = MemoryPlan("normal")
_HALF = MemoryPlan("half", "bfloat16", at_once=2, frugal=True)
_RECOMPUTE = replace(_HALF, name="recompute", recompute=True, at_once=1)
PLANS = (  # from generous to frugal
    NORMAL,
    _HALF,
    _RECOMPUTE,
    replace(_RECOMPUTE, name="int8", quantised="int8"),
    replace(_RECOMPUTE, name="nf4", quantised="nf4"),
)


@dataclass(frozen=True)
class Work:
    """What a run asks of a base: `samples` images of `side` x `side` px per pass, with gradients
    or without."""

    samples: int
    side: int
    trains: bool
    exact: bool = False  # the base may not be quantised: what comes of it outlives the run
    least: int = 1  # samples that no plan can part
    then: Work | None = None  # what follows in the same run


@dataclass(frozen=True)
class Size:
    """How many numbers a base has, and what they say of the memory that it works in."""

    linear: int  # of the layers that can be quantised
    others: int
    autoencoder: int
    width: int  # of the UNet's first layer
    depth: int = 2  # residual blocks of its first level
    decoded: float = 10.5 * 128  # numbers for a pixel of a picture while it is decoded


@dataclass(frozen=True)
class Choice:
    """A plan, why it was chosen, and those that are smaller, in order."""

    plan: MemoryPlan
    reason: str
    smaller: tuple[MemoryPlan, ...]

    @property
    def line(self) -> str:
        """Return what the user is told before the work."""
        return f"memory: {describe(self.plan)}; {self.reason}"


BYTES = {"float32": 4.0, "bfloat16": 2.0, "float16": 2.0, "int8": 1.0, "nf4": 0.5625}
LATENT = 8  # pixels of a latent position's side, in every family
SHARE = 0.9  # of the free memory that a plan may take: the rest is for what is not counted
# Numbers of working memory for a sample, latent position, channel of the UNet's first layer and
# residual block of its first level. Peaks of Stable Diffusion 1.5's shape, which has two of those,
# at 512 px in bfloat16 on a CPU were 210, 115 and 40; of `tiny`, which has one, 219, 109 and 25.
# Residuals on convolutions as well add 5 to the first: a convolution keeps its input anyway.
KEPT, RECOMPUTED, DRAWN = 225, 125, 50
# Numbers for a pixel and channel of what the decoder's last layer reads: AutoencoderKL keeps more
# of them than AutoencoderTiny, which has no norms.
DECODED = {"decoder.conv_out.weight": 10.5, "decoder.layers.": 3.0}
FIRST_LEVEL = re.compile(
    r"(down_blocks\.0\.resnets\.\d+\.conv1|input_blocks\.[12]\.0\.in_layers\.2)\.weight"
)
OVERHEAD = 5e8  # bytes: libraries, the device's context, the bases of the targets
LEARNING = 1.5e8  # more of them to train: recogniser, optimizer, kernels of the backward pass


def choose(spec: BaseSpec, device: str, asked: str, work: Work, free: int | None = None) -> Choice:
    """Choose the plan: what was asked for, or the most generous that fits into `free` bytes.

    `free` None asks the device. HdbError for another word than the three, or if the
    base's files are not what they were.
    """
    if asked not in MEMORIES:
        raise UsageError(f"unknown --memory {asked!r}; choose {', '.join(MEMORIES)}")
    spec.check()
    size = measure(spec)
    plans = [_suited(plan, device, work) for plan in PLANS if not (work.exact and plan.quantised)]
    if size is None:  # a plug-in's own loader: nothing is known of its number formats
        return Choice(NORMAL, f"{spec.name} names no files to plan by", ())
    free = free_memory(device) if free is None else free
    # Several processes share one computation: none may choose, or turn back, alone.
    alone = os.environ.get("WORLD_SIZE", "1") == "1"
    needs = [estimate(size, plan, work) for plan in plans]
    if asked == "low":
        index = len(plans) - 1
    elif asked not in ("auto", "normal"):
        index = [plan.name for plan in plans].index(asked)
    elif asked == "normal" or free is None or not alone:
        index = 0
    else:
        fits = [need <= SHARE * free for need in needs]
        index = fits.index(True) if any(fits) else len(plans) - 1
    there = "an unknown amount" if free is None else gigabytes(free)
    reason = f"about {gigabytes(needs[index])} of {there} free on {device}"
    if index:
        reason += f" (normal: {gigabytes(needs[0])})"
    return Choice(plans[index], reason, tuple(plans[index + 1 :]) if alone else ())


def run_within(
    choice: Choice,
    attempt: Callable[[MemoryPlan], T],
    say: Callable[[str], None],
    advice: str = "ask for fewer or smaller pictures",
) -> T:
    """Run the attempt on the chosen plan; out of memory, once more on the next smaller one.

    HdbError with advice if there is none, or if memory runs out again.
    """
    plans = [choice.plan, *choice.smaller[:1]]
    for plan, smaller in zip(plans, [*plans[1:], None], strict=True):
        try:
            return attempt(plan)
        except (MemoryError, RuntimeError) as error:
            if not out_of_memory(error):
                raise
        # Past the except block, so that the traceback no longer holds the tensors of the attempt.
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        if smaller is not None:
            say(f"warning: out of memory with plan {plan.name}; trying {describe(smaller)}")
    raise HdbError(
        f"out of memory with plan {plans[-1].name} ({choice.reason}); close other programs, "
        f"{advice}, or try --memory low or --device cpu"
    )


@contextmanager
def enough(advice: str) -> Iterator[None]:
    """Turn running out of memory, where there is no smaller plan, into HdbError with advice."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
        raise HdbError(f"out of memory; {advice}, or try --device cpu") from None


def describe(plan: MemoryPlan) -> str:
    """Say a plan in words."""
    words = [f"{plan.name}, {plan.dtype} weights"]
    words += [f"linear layers in {plan.quantised}"] if plan.quantised else []
    words += ["gradient checkpointing"] if plan.recompute else []
    words += [f"{plan.at_once} at once"] if plan.at_once else []
    return ", ".join(words)


def measure(spec: BaseSpec) -> Size | None:
    """Count a base's numbers from the headers of its files; None if it names none that can
    be read."""
    if spec.files is None:
        return None
    try:
        components = read_checkpoint(spec.files).components
    except HdbError:
        return None
    linear = others = autoencoder = width = depth = 0
    decoded = Size.decoded
    for component, tensors in components.items():
        for name, info in tensors.items():
            numbers = math.prod(info.shape)
            if component == "vae":
                autoencoder += numbers
                for start, held in DECODED.items():
                    if name.startswith(start) and len(info.shape) == 4 and info.shape[0] == 3:
                        decoded = held * info.shape[1]  # the layer that makes the colours
            elif len(info.shape) == 2 and not re.search(r"(token|position\w*)_embedding", name):
                linear += numbers
            else:
                others += numbers
            if component == "unet" and name in ("conv_in.weight", "input_blocks.0.0.weight"):
                width = info.shape[0]
            depth += component == "unet" and bool(FIRST_LEVEL.fullmatch(name))
    return Size(linear, others, autoencoder, width, depth, decoded) if width else None


def estimate(size: Size, plan: MemoryPlan, work: Work) -> float:
    """Return the bytes that a run will take at its peak, roughly."""
    number = BYTES[plan.dtype]
    weights = size.linear * BYTES[plan.quantised or plan.dtype]
    weights += (size.others + size.autoencoder) * number
    samples = max(work.least, min(work.samples, plan.at_once or work.samples))
    positions = samples * (work.side / LATENT) ** 2
    passing = DRAWN if not work.trains else RECOMPUTED if plan.recompute else KEPT
    working = max(passing * size.depth * positions * size.width, size.decoded * work.side**2)
    need = OVERHEAD + LEARNING * work.trains + weights + number * working
    return max(need, estimate(size, plan, work.then)) if work.then else need


def gigabytes(count: float) -> str:
    return f"{count / 1e9:.1f} GB"


def free_memory(device: str) -> int | None:
    """Return the bytes that a device has free, None where it is unknown."""
    kind = device.split(":")[0]
    if kind == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if kind == "mps":
        return torch.mps.recommended_max_memory() - torch.mps.current_allocated_memory()
    return free_ram()


def _suited(plan: MemoryPlan, device: str, work: Work) -> MemoryPlan:
    """Draw on a GPU with weights in half precision: exact enough for that, not to train. A GPU
    without bfloat16 draws in float16 and trains in float32, since float16 loses small gradients."""
    if not device.startswith("cuda"):
        return plan
    if not work.trains:
        return replace(plan, dtype="bfloat16" if has_bf16(device) else "float16")
    return plan if has_bf16(device) else replace(plan, dtype="float32")
