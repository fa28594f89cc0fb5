"""The training loop: a run that was cut off ends with the same numbers as one that was not."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest
import torch
from torch import Tensor

from hdbcli.model.device import make_optimizer
from hdbcli.training.loop import Plan, averages_of, fit
from registry.errors import HdbError

PLAN = Plan(steps=12, lr=1e-2, warmup=3, average=0.9, checkpoint_seconds=0.0)


def problem(optimizer: str) -> tuple[dict[str, Tensor], Callable, torch.optim.Optimizer]:
    torch.manual_seed(0)
    weights = torch.randn(5000).requires_grad_(True)

    def losses(generator: torch.Generator) -> Iterator[Tensor]:
        yield (weights - torch.randn(5000, generator=generator)).pow(2).mean()

    return {"w": weights}, losses, make_optimizer(optimizer, [weights], PLAN.lr)[0]


def run(optimizer: str, checkpoint: Path | None, steps: int = 12) -> tuple[Tensor, Tensor]:
    parameters, losses, chosen = problem(optimizer)
    averages = {k: p.detach().clone() for k, p in parameters.items()}
    for _ in islice(fit(parameters, losses, chosen, PLAN, averages, checkpoint), steps):
        pass
    return parameters["w"].detach(), averages["w"]


@pytest.mark.parametrize("optimizer", ["adamw", "adamw8bit"])
def test_resumed_equals_uninterrupted(optimizer: str, tmp_path: Path) -> None:
    whole, whole_average = run(optimizer, None)
    path = tmp_path / "c.safetensors"
    cut, _ = run(optimizer, path, steps=5)
    resumed, average = run(optimizer, path)
    assert not torch.equal(cut, whole)
    assert torch.equal(resumed, whole) and torch.equal(average, whole_average)


def test_schedule_and_average() -> None:
    rates = [PLAN.rate(i) for i in range(12)]
    assert rates[0] < rates[1] < rates[2] > rates[-1] > 0
    weights, average = run("adamw", None)
    assert not torch.equal(weights, average)


def test_checkpoint_of_another_model(tmp_path: Path) -> None:
    path = tmp_path / "c.safetensors"
    run("adamw", path, steps=2)
    parameters, losses, optimizer = problem("adamw")
    with pytest.raises(HdbError, match="another model"):
        next(fit({"other": parameters["w"]}, losses, optimizer, PLAN, None, path))
    other = replace(PLAN, of="lr 1")
    with pytest.raises(HdbError, match=r"another run \(unknown\), this is one of \(lr 1\)"):
        next(fit(parameters, losses, optimizer, other, None, path))
    path.write_bytes(b"half")
    with pytest.raises(HdbError, match="cannot resume"):
        next(fit(parameters, losses, optimizer, PLAN, None, path))
    path.unlink()
    assert next(fit(parameters, losses, optimizer, PLAN, None, path)).number == 1


def test_a_step_is_the_rate_times_the_clipped_gradient() -> None:
    weight = torch.zeros(2, requires_grad=True)
    plan = Plan(steps=4, lr=0.1, warmup=2, decay=0.5, average=0.4)
    averages = averages_of({"w": weight})
    optimizer = torch.optim.SGD([weight], lr=9.0)
    now = mean = before = torch.zeros(2)

    opened: list[str] = []

    def losses(_: torch.Generator) -> Iterator[Tensor]:
        for part in ([3.0, 0.0], [0.0, 4.0]):
            opened.append("open")
            yield weight @ torch.tensor(part)
            assert weight.grad is not None and weight.grad[int(part[0] == 0)] == sum(part)
            opened.append("closed")

    for step in fit({"w": weight}, losses, optimizer, plan, averages):
        assert opened == ["open", "closed"] * 2 * step.number  # one part at a time
        assert step.loss == pytest.approx(float(before @ torch.tensor([3.0, 4.0])))
        before = now - 0.1 * min(1, step.number / 2) * (1 - (step.number - 1) / 4) ** 0.5 * (
            torch.tensor([0.6, 0.8])
        )
        rate = 0.1 * min(1, step.number / 2) * (1 - (step.number - 1) / 4) ** 0.5
        now = now - rate * torch.tensor([0.6, 0.8])  # of length 1
        keep = min(0.4, step.number / (step.number + 9))
        mean = keep * mean + (1 - keep) * now
        torch.testing.assert_close(weight.detach(), now)
        torch.testing.assert_close(averages["w"], mean)


def test_a_group_learns_as_many_times_as_fast_as_it_says() -> None:
    slow, fast = (torch.ones(3).requires_grad_() for _ in range(2))
    optimizer = torch.optim.SGD([{"params": [slow]}, {"params": [fast], "times": 4.0}], 0.1)
    plan = Plan(steps=2, lr=0.1, clip=None)
    for _ in fit({"slow": slow, "fast": fast}, lambda _: [slow.sum(), fast.sum()], optimizer, plan):
        pass
    assert torch.allclose(1 - slow, torch.tensor(0.15))  # 0.1 and half of it
    assert torch.allclose(1 - fast, torch.tensor(0.6))
