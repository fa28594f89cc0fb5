"""Steps begin where the noise ends, however many they are, and too many are one line."""

from __future__ import annotations

import json
from dataclasses import replace
from math import ceil
from typing import Any

import pytest

from hdbcli.model.base import Base
from registry.errors import HdbError
from registry.spec import SampleSettings
from registry.stable_diffusion.backbone import (
    SCHEDULERS,
    StableDiffusion,
    _scheduler,
    _spaced,
)
from registry.stable_diffusion.families import CONFIGS

SD1 = json.loads((CONFIGS / "sd1" / "scheduler" / "scheduler_config.json").read_text())


def own(name: str) -> Any:
    import diffusers

    if name == "own":
        return diffusers.PNDMScheduler.from_config(SD1)
    return _scheduler(SampleSettings(scheduler=name), SD1 | {"timestep_spacing": "leading"})


@pytest.mark.parametrize("name", ["own", *(name for name in SCHEDULERS if name != "lcm")])
@pytest.mark.parametrize("steps", [2, 4, 8, 25, 50, 150, 333, 600, 900, 999, 1000])
def test_the_first_step_is_at_the_last_noise(name: str, steps: int) -> None:
    schedule = _spaced(own(name), steps)
    schedule.set_timesteps(steps)
    first, last = float(schedule.timesteps[0]), float(schedule.timesteps[-1])
    assert 950 <= first <= 999 and 0 <= last < first
    assert steps in (25, 50, 333) or first >= 998  # what begins late enough stays as it is


def test_four_steps_are_those_that_few_step_models_know() -> None:
    schedule = _spaced(own("ddim"), 4)
    schedule.set_timesteps(4)
    assert schedule.timesteps.tolist() == [999, 749, 499, 249]
    plain = own("ddim")  # the control
    plain.set_timesteps(4)
    assert plain.timesteps.tolist() == [751, 501, 251, 1]


def test_trailing_spacing_of_a_few_step_model_is_exact_for_any_steps() -> None:
    """Also where a scheduler's own spacing reaches the last noise, as Euler's linear one does."""
    euler = _scheduler(SampleSettings(scheduler="euler"), SD1)
    wanted = {1: [999], 2: [999, 499], 8: [999, 874, 749, 624, 499, 374, 249, 124]}
    for steps, times in wanted.items():
        schedule = _spaced(euler, steps, trailing=True)
        schedule.set_timesteps(steps)
        assert schedule.timesteps.tolist() == times
    schedule = _spaced(euler, 2)  # the control
    schedule.set_timesteps(2)
    assert schedule.timesteps.tolist() == [999, 0]


def test_more_steps_than_there_are_is_one_line() -> None:
    with pytest.raises(HdbError, match="--steps 1001 is more than the 1000"):
        _spaced(own("own"), 1001)


class Stop(Exception):
    """Ends a drawing once its steps are known."""


@pytest.mark.parametrize("steps", [1, 2, 6, 7, 25, 225, 333, 899, 900, 901, 1000])
def test_shifted_steps_lie_towards_the_noise(
    tiny: Base, monkeypatch: pytest.MonkeyPatch, steps: int
) -> None:
    """tiny's own are those of Esser et al. 2024, eq. 23, and go over into even ones where many
    steps would fall on one timestep."""
    backbone = tiny.backbone
    assert isinstance(backbone, StableDiffusion) and backbone.shift > 1
    even = [ceil(1000 * (1 - k / steps) - 1e-6) - 1 for k in range(steps)]
    own = drawn_at(backbone, steps, monkeypatch)
    assert own == sorted(set(own), reverse=True) and own[0] == 999 and own[-1] >= even[-1]
    assert all(mine >= evenly for mine, evenly in zip(own, even, strict=True))
    assert (own == even) == (steps in (1, 900, 901, 1000))
    if steps < 225:
        shifted = [4 * t / (1 + 3 * t) for t in (1 - k / steps for k in range(steps))]
        assert own == [ceil(1000 * t - 1e-6) - 1 for t in shifted]
    plain = drawn_at(replace(backbone, shift=1.0), steps, monkeypatch)  # the control
    assert plain == even


def drawn_at(backbone: StableDiffusion, steps: int, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return the timesteps that a drawing would go through."""
    found: list[int] = []

    def look(pipeline: Any, *_: object, **__: object) -> None:
        found.extend(pipeline.scheduler.timesteps.tolist())
        raise Stop

    monkeypatch.setattr(type(backbone.pipeline), "prepare_latents", look)
    with pytest.raises(Stop):
        backbone.sample(["a face"], SampleSettings(steps=steps), [0], lambda *_: None)
    return found
