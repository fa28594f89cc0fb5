"""Choose device, number format and optimizer in one place, and say what was chosen."""

from __future__ import annotations

import atexit
import ctypes
import hashlib
import os
import platform
import re
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from hdbcli.config import DEVICES, OPTIMIZERS, PRECISIONS
from registry.errors import HdbError, HdbWarning, UsageError
from registry.stable_diffusion.uncompiled import light_optimizers, without_compiler

M_MMAP_THRESHOLD = -3  # of glibc's malloc.h
FEW = 2048  # positions of latents; `tiny` has 256 a picture, Stable Diffusion 4,096
LARGE = 6_000_000  # bytes: what is larger goes back as soon as it is freed


def choose_device(name: str | None) -> str:
    """Return the device asked for, or the fastest there is; HdbError if it is not there."""
    there = {
        "cpu": True,
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
    }
    if name is None:
        name = next(device for device in ("cuda", "mps", "cpu") if there[device])
    kind, _, index = name.partition(":")
    if not there.get(kind, False) or (index and not index.isdecimal()):
        usable = ", ".join(device for device in DEVICES if there[device])
        raise HdbError(f"device {name!r} is not available here; use {usable}")
    if name == "cuda" and "LOCAL_RANK" in os.environ:  # of `accelerate launch`: a device each
        index = os.environ["LOCAL_RANK"]
        name = f"cuda:{index}"
    if kind == "cuda" and index and int(index) >= torch.cuda.device_count():
        raise HdbError(
            f"there is no {name} here, the GPUs are {torch.cuda.device_count()}; start as many "
            "processes as there are, or pass --device cpu"
        )
    return name


@dataclass(frozen=True)
class Workers:
    """The processes that `accelerate launch` or `torchrun` started, or this one alone."""

    rank: int
    count: int
    share: Callable[[list[Tensor]], None] | None  # averages tensors over the processes, in place
    meet: Callable[[], object] = bool  # waits for all of them
    # Raises HdbError unless all are in the same run, which a text describes, at the same step.
    agree: Callable[[str, int], None] | None = None

    @contextmanager
    def first(self) -> Iterator[None]:
        """Let the first process do what is in the block, then the others, who find it done."""
        if self.rank:
            self.meet()
        yield
        if not self.rank:
            self.meet()


ALONE = Workers(0, 1, None)


def join_workers(device: str) -> Workers:
    """Meet the other processes of `accelerate launch` or `torchrun`, if one of them started us."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return ALONE
    from accelerate import Accelerator, InitProcessGroupKwargs

    # The others wait while one of them draws and measures people held out.
    patience = InitProcessGroupKwargs(timeout=timedelta(hours=6))
    accelerator = Accelerator(cpu=not device.startswith("cuda"), kwargs_handlers=[patience])
    # Python ends with the group's threads running otherwise, and one time in six by SIGABRT.
    atexit.register(accelerator.end_training)

    def together(work: Callable[[Tensor], Tensor], tensor: Tensor) -> Tensor:
        try:
            return work(tensor)
        except RuntimeError as error:
            raise HdbError(
                f"another process of the training was lost ({_line(error)}); start the same "
                "command again: it goes on from the last checkpoint"
            ) from error

    def share(tensors: list[Tensor]) -> None:
        flat = torch.cat([tensor.flatten() for tensor in tensors])
        flat = together(partial(accelerator.reduce, reduction="mean"), flat)
        for tensor, part in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
            tensor.copy_(part.view_as(tensor))

    def agree(of: str, step: int) -> None:
        digest = int.from_bytes(hashlib.sha256(of.encode()).digest()[:7], "big")
        mine = torch.tensor([[digest, step]], device=accelerator.device)
        for rank, (other, at) in enumerate(together(accelerator.gather, mine).tolist()):
            if (other, at) != (digest, step):
                what = f"step {at}, not {step}" if at != step else f"other data or settings ({of})"
                raise HdbError(
                    f"process {rank} starts with {what}: every node must see the same prepared "
                    "people and the same checkpoint; put both on storage that all nodes share"
                )

    return Workers(
        accelerator.process_index,
        accelerator.num_processes,
        share,
        accelerator.wait_for_everyone,
        agree,
    )


def autocast(
    device: str, precision: str = "auto", latents: Tensor | None = None
) -> AbstractContextManager:
    """Run matrix products in bfloat16 inside the block where `in_halves` says so."""
    if not in_halves(device, precision, latents):
        return nullcontext()
    return torch.autocast(device.split(":")[0], dtype=torch.bfloat16)


def in_halves(device: str, precision: str = "auto", latents: Tensor | None = None) -> bool:
    """Say whether matrix products run in bfloat16: where the device does that fast, unless
    `precision` is fp32.

    On a CPU that takes AMX: with AVX-512 alone, which multiplies bfloat16 too, `tiny` takes 1.5
    times as long as in float32. And the few `latents` (B, c, h, w) of one person take longer so
    anywhere: every pass casts all weights anew.
    """
    if precision not in PRECISIONS:
        raise UsageError(f"unknown precision {precision!r}; choose {' or '.join(PRECISIONS)}")
    if precision == "fp32":
        return False
    if device.startswith("cpu"):
        few = latents is not None and latents[:, 0].numel() < FEW
        return not few and torch.backends.mkldnn.is_available() and has_amx()
    return device.startswith("cuda") and has_bf16(device)


def machine(device: str) -> str:
    """Name what a measurement was made on."""
    name = f"{platform.machine()}, {os.cpu_count()} cores"
    if device.startswith("cuda"):
        name += f", {torch.cuda.get_device_name(device)}"
    return name


def peak_memory(device: str) -> int:
    """Return the most memory in bytes that this process has held, on a GPU that of the GPU; 0 where
    it is unknown."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated(device)
    try:  # getrusage counts what the process that started this one held
        return 1024 * int(re.findall(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[0])
    except (OSError, IndexError):
        try:
            import resource
        except ImportError:  # Windows
            return 0
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def give_back_memory() -> None:
    """Return freed memory to the system, now and from here on, where glibc would keep it.

    Quantised layers expand their weights for a moment, one after the other: what is kept of that
    is as much as quantising saves. A fifth of the speed is the price.
    """
    with suppress(OSError, AttributeError):  # no glibc
        glibc = ctypes.CDLL(None)
        glibc.mallopt(M_MMAP_THRESHOLD, LARGE)
        glibc.malloc_trim(0)


def wait_for(device: str) -> None:
    """Wait until a GPU has done what it was given, before a look at the clock."""
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)


def has_bf16(device: str) -> bool:
    """Say whether a GPU computes in bfloat16 itself, not by emulation."""
    with torch.cuda.device(device):
        return torch.cuda.is_bf16_supported(including_emulation=False)


def has_amx() -> bool:
    """Say whether this CPU has tiles of bfloat16; torch before 2.5 cannot tell."""
    return bool(getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)())


def make_optimizer(
    name: str, parameters: Iterable[Tensor], lr: float, weight_decay: float = 0.0
) -> tuple[torch.optim.Optimizer, str]:
    """Build the optimizer; return it and the name of what it really is, with a warning if
    that differs.

    AdamW8bit keeps its two moments in 8 bits (in tensors of 4,096 numbers or more). Where
    bitsandbytes is missing or broken torch's AdamW serves instead.
    """
    parameters = list(parameters)
    if name not in OPTIMIZERS:
        raise UsageError(f"unknown optimizer {name!r}; choose one of {', '.join(OPTIMIZERS)}")
    light_optimizers()
    if name == "adamw8bit":
        try:
            with without_compiler():
                from bitsandbytes.optim import AdamW8bit

            eight = AdamW8bit(parameters, lr=lr, weight_decay=weight_decay)
            _probe(AdamW8bit, parameters[0].device)
            return eight, "adamw8bit"
        except Exception as error:  # a broken native library raises anything
            text = f"bitsandbytes does not work here ({_line(error)}); using AdamW in 32 bits"
            warnings.warn(text, HdbWarning, stacklevel=2)
    return torch.optim.AdamW(parameters, lr=lr, weight_decay=weight_decay), "adamw"


def _probe(kind: Callable[..., torch.optim.Optimizer], device: torch.device) -> None:
    """Take one real 8-bit step on a scratch tensor: a broken library shows itself only then."""
    scratch = torch.zeros(4096, device=device, requires_grad=True)
    scratch.grad = torch.ones_like(scratch)
    kind([scratch], lr=1e-3).step()


def _line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
