"""The one training loop: steps, schedule, average weights, and checkpoints that resume to the
same numbers.

The recipe of `tiny` and every stage of hdb use it; what differs is which parameters are trained
and which loss is taken. Checkpoints are safetensors, never pickle.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from registry.checkpoints.safetensors import read_tensors, save_tensors
from registry.errors import HdbError
from registry.files import write_kept
from registry.seeds import generator_of

# generator -> the parts of a step's loss, which is their sum
Losses = Callable[[torch.Generator], Iterable[Tensor]]


@dataclass(frozen=True)
class Plan:
    """How long and how fast: linear warm-up, then (1 - progress)^decay down to nothing."""

    steps: int
    lr: float
    warmup: int = 0
    decay: float = 1.0
    clip: float | None = 1.0  # longest gradient
    average: float = 0.0  # decay of the moving average of the weights; 0 keeps none
    seed: int = 0
    checkpoint_seconds: float = 120.0
    of: str = ""  # what else decides the numbers: a checkpoint of another run is refused

    def rate(self, step: int) -> float:
        """Return the learning rate of a step, counted from 0."""
        warm = min(1.0, (step + 1) / self.warmup) if self.warmup else 1.0
        return self.lr * warm * (1 - step / self.steps) ** self.decay


@dataclass(frozen=True)
class Step:
    """What one step did; `left` is the seconds that the rest will take."""

    number: int
    steps: int
    loss: float
    left: float


def fit(
    parameters: Mapping[str, Tensor],
    losses: Losses,
    optimizer: torch.optim.Optimizer,
    plan: Plan,
    averages: Mapping[str, Tensor] | None = None,
    checkpoint: Path | None = None,
    share: Callable[[list[Tensor]], None] | None = None,
    writes: bool = True,
    agree: Callable[[str, int], None] | None = None,
) -> Iterator[Step]:
    """Train `parameters` in place, yielding after every step.

    `losses` draws its own batch and noise from the generator it is handed, so that the whole run is
    a function of `plan.seed`, and yields the parts of the loss one by one. The gradient of each is
    taken before the next is asked for: no two of them are held in memory, and whatever the backward
    pass of a part needs stays open. With `checkpoint`, a run that was cut off continues from the
    last one saved. Of several processes each calls `share`, which averages the gradients in place,
    one `writes`, and all `agree` on the run and its first step before they start. A group of the
    optimizer learns `times` as fast, where it says so.
    """
    generator = generator_of(plan.seed)
    first = 0
    if checkpoint and checkpoint.exists():
        first = _resume(checkpoint, plan, parameters, optimizer, generator, averages or {})
    if agree is not None:
        agree(plan.of, first)
    start = saved = time.perf_counter()
    for number in range(first, plan.steps):
        for group in optimizer.param_groups:
            group["lr"] = plan.rate(number) * group.get("times", 1.0)
        optimizer.zero_grad(set_to_none=True)
        value = 0.0
        for part in losses(generator):
            part.backward()
            value += part.item()
        if share is not None:
            share([p.grad for p in parameters.values() if p.grad is not None])
        if plan.clip is not None:
            torch.nn.utils.clip_grad_norm_(parameters.values(), plan.clip)
        optimizer.step()
        if averages is not None:
            _average(averages, parameters, min(plan.average, (number + 1) / (number + 10)))
        now = time.perf_counter()
        last = number + 1 == plan.steps
        if checkpoint and writes and (last or now - saved > plan.checkpoint_seconds):
            state = {"step": str(number + 1), "of": plan.of}
            _save(checkpoint, state, parameters, optimizer, generator, averages or {})
            saved = now
        left = (now - start) / (number + 1 - first) * (plan.steps - number - 1)
        yield Step(number + 1, plan.steps, value, left)


def averages_of(parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Start the moving averages that `fit` keeps: a copy of every parameter."""
    return {name: parameter.detach().clone() for name, parameter in parameters.items()}


@contextmanager
def averaged(parameters: Mapping[str, Tensor], averages: Mapping[str, Tensor]) -> Iterator[None]:
    """Put the averages in the place of the parameters inside the block."""
    own = {name: parameter.data for name, parameter in parameters.items()}
    try:
        for name, parameter in parameters.items():
            parameter.data = averages[name]
        yield
    finally:
        for name, parameter in parameters.items():
            parameter.data = own[name]


@torch.no_grad()
def settle(parameters: Mapping[str, Tensor], averages: Mapping[str, Tensor]) -> None:
    """Put the averages in the place of the parameters, at the end."""
    for name, parameter in parameters.items():
        parameter.copy_(averages[name])


@torch.no_grad()
def _average(averages: Mapping[str, Tensor], parameters: Mapping[str, Tensor], keep: float) -> None:
    torch._foreach_lerp_(list(averages.values()), [p.data for p in parameters.values()], 1 - keep)


def _save(
    path: Path,
    state: Mapping[str, str],
    parameters: Mapping[str, Tensor],
    optimizer: torch.optim.Optimizer,
    generator: torch.Generator,
    averages: Mapping[str, Tensor],
) -> None:
    tensors = {f"parameter.{k}": v.detach() for k, v in parameters.items()}
    tensors |= {f"average.{k}": v for k, v in averages.items()}
    tensors["generator"] = generator.get_state()
    for name, parameter in parameters.items():
        for key, value in optimizer.state[parameter].items():
            kind = "tensor" if isinstance(value, Tensor) else "number"
            tensors[f"optimizer.{kind}.{key}.{name}"] = torch.as_tensor(value)
    contiguous = {k: v.contiguous().clone() for k, v in tensors.items()}
    write_kept(path, lambda file: save_tensors(contiguous, file, {"format": "pt", **state}))


def _resume(
    path: Path,
    plan: Plan,
    parameters: Mapping[str, Tensor],
    optimizer: torch.optim.Optimizer,
    generator: torch.Generator,
    averages: Mapping[str, Tensor],
) -> int:
    try:
        metadata, tensors = read_tensors(path)
        step, of = int(metadata["step"]), metadata.get("of", "")
    except (HdbError, KeyError, ValueError) as error:
        raise HdbError(f"cannot resume from {path} ({error}); delete it to start again") from error
    if of != plan.of:
        raise HdbError(
            f"{path} is of another run ({of or 'unknown'}), this is one of ({plan.of}); go on with "
            "those settings, give another place, or delete it to start again"
        )
    generator.set_state(tensors.pop("generator"))
    expected = {f"parameter.{k}" for k in parameters} | {f"average.{k}" for k in averages}
    found = {k for k in tensors if not k.startswith("optimizer.")}
    if expected != found:
        odd = sorted(expected ^ found)[0]
        raise HdbError(
            f"{path} is of another model ({odd} is in only one); delete it to start again"
        )
    with torch.no_grad():
        for name, value in averages.items():
            value.copy_(tensors[f"average.{name}"])
        for name, parameter in parameters.items():
            parameter.copy_(tensors[f"parameter.{name}"])
    for key, value in tensors.items():
        if key.startswith("optimizer."):
            _, kind, field, name = key.split(".", 3)
            if kind == "tensor" and field != "step":  # which AdamW counts on the CPU
                value = value.to(parameters[name].device)
            optimizer.state[parameters[name]][field] = value if kind == "tensor" else value.item()
    return step
