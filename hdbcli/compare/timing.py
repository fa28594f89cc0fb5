"""Time one method for one person in a process of its own: start-up, preparation, a step,
peak memory."""

from __future__ import annotations

import multiprocessing
import statistics
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from hdbcli.compare.methods import Method
from hdbcli.config import RefineConfig
from registry.errors import HdbError


@dataclass(frozen=True)
class Rounds:
    """How many steps are taken before the clock is looked at, and then."""

    warm_up: int = 3
    timed: int = 12


@dataclass(frozen=True)
class Alone:
    """What one person costs: seconds, and the peak of memory in bytes, resident or on a GPU."""

    startup: float  # loading libraries, base and hypernetwork
    prepare: float  # predicting, or drawing pictures of the class
    first: tuple[float, ...]  # steps as they were timed, the first of which take longer
    step: float  # the median of those that warmed up
    memory: int

    def seconds(self, steps: int) -> float:
        """Return the seconds of `steps` steps with what precedes them, start-up apart."""
        timed = self.first[:steps]
        return self.prepare + sum(timed) + (steps - len(timed)) * self.step


def time_alone(
    method: Method,
    load: Callable[[], tuple],
    crop: np.ndarray,
    batch: int,
    rounds: Rounds = Rounds(),
) -> Alone:
    """Run a few steps in a fresh process; `load` is picklable and returns (base, hypernetwork)."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        try:
            return pool.submit(_time, method, load, crop, batch, rounds, time.time()).result()
        except BrokenProcessPool:
            raise HdbError(
                f"the process that timed {method.name} was ended by the system, which it often "
                "does to the one that takes the most memory; close other programs or leave "
                f"{method.name} out"
            ) from None
        except BaseException:  # an interrupted run need not wait for it
            for child in multiprocessing.active_children():
                child.kill()
            raise


def _time(
    method: Method,
    load: Callable[[], tuple],
    crop: np.ndarray,
    batch: int,
    rounds: Rounds,
    asked: float,
) -> Alone:
    from hdbcli.model.device import peak_memory, wait_for
    from hdbcli.training.refine import train

    base, model = load()
    startup = time.time() - asked
    count = rounds.warm_up + rounds.timed
    config = RefineConfig(count, lr=max(method.lr, 1e-12), batch=batch, optimizer=method.optimizer)
    face = base.faces([crop])  # what is loaded at the first call belongs to the start-up
    if method.predicted and model:
        model.predict(face, method.iterations)
    wait_for(base.device)
    began = time.perf_counter()
    face = base.faces([crop])  # encoding and the recogniser are part of a prediction
    with method.prepared(base, model, [face], lambda *_: None) as trainable:
        wait_for(base.device)
        prepared = time.perf_counter()
        steps = train(base, trainable, [face.latents], config) if method.steps else ()
        seconds = step_seconds(steps)
    step = statistics.median(seconds[rounds.warm_up :]) if seconds else 0.0
    return Alone(startup, prepared - began, tuple(seconds), step, peak_memory(base.device))


def step_seconds(steps: Iterable[object], done: Callable[[], object] = bool) -> list[float]:
    """Return how long each step took; `done` waits for a device that works on by itself."""
    marks = [time.perf_counter()]
    for _ in steps:
        done()
        marks.append(time.perf_counter())
    return [after - before for before, after in pairwise(marks)]
