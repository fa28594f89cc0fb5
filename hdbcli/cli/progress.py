"""How far a command is: one line for all of its stages, with the time that is left in all."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TaskID, TextColumn
from rich.progress_bar import ProgressBar
from rich.text import Text

STAGES = {
    "start": "starting",
    "crop": "finding the face",
    "load": "loading the base model",
    "hash": "reading its files",
    "predict": "predicting",
    "refine": "refining",
    "draw": "drawing",
    "read": "reading photos",
    "compare": "comparing people",
    "train": "training",
    "loss": "measuring the loss",
    "merge": "merging",
}
# Seconds of a unit of each stage on `tiny` and a laptop's CPU: a photo to crop, an iteration to
# refine, a step of one picture to draw. Only their ratios count once a stage has shown its pace.
SECONDS = {"start": 3.0, "crop": 0.5, "load": 2, "predict": 0.5, "refine": 0.2, "draw": 0.02}
STUCK = 0.1  # of the time that a stage has taken, what is still left when it should have ended


class Timeline:
    """What of a command's stages is done and left, in seconds.

    A stage that tells its steps goes on at the pace it has shown. What has not begun is expected to
    be as much slower than planned as what is over: a base that loads slowly draws slowly.
    """

    def __init__(
        self, planned: Mapping[str, float], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._planned = {name: SECONDS.get(name, 1.0) * n for name, n in planned.items() if n}
        self._clock = clock
        self._start = self._began = self._told = clock()
        self._later = [*self._planned]  # stages that have not begun
        self._over = 0.0, 0.0  # seconds planned, and taken, of stages that are over
        self._fraction = 0.0
        self.stage, self.done, self.total = "", 0, 1

    def tell(self, stage: str, done: int, total: int) -> None:
        """Note what a stage says of itself; if it is not that of before, it begins now."""
        now = self._clock()
        if stage != self.stage:
            planned, taken = self._over
            if self.stage in self._planned:
                self._over = planned + self._planned[self.stage], taken + now - self._began
            if stage in self._planned:  # once more, where a command begins again
                self._later = [*self._planned][[*self._planned].index(stage) + 1 :]
            if not self._planned:  # each stage by itself
                self._start, self._fraction = now, 0.0
            self._began = now
        self.stage, self.done, self.total, self._told = stage, done, max(1, total), now

    def pause(self, seconds: float) -> None:
        """Leave out time in which the command waited for its user."""
        self._start += seconds
        self._began += seconds
        self._told += seconds

    def elapsed(self) -> float:
        """Return the seconds since the command began, or its stage where nothing is planned."""
        return self._clock() - self._start

    def left(self) -> float | None:
        """Return the seconds to the end of all stages, or of this one where nothing is planned;
        None if nothing tells."""
        spent, pace = self._clock() - self._began, self._pace()
        if self.done:
            a_step = (self._told - self._began) / self.done
            own = max(0.0, a_step * self.total - spent)
        elif self.stage in self._planned:
            own = max(self._planned[self.stage] * pace - spent, STUCK * spent)
        elif self._planned:
            own = 0.0
        else:
            return None
        return own + pace * sum(self._planned[name] for name in self._later)

    def fraction(self) -> float:
        """Return the share of the time that is over; it never falls."""
        left, elapsed = self.left(), self.elapsed()
        if left is not None and elapsed + left > 0:
            self._fraction = max(self._fraction, elapsed / (elapsed + left))
        return self._fraction

    def _pace(self) -> float:
        """Return how many times longer than planned things take: this stage, if it has told steps
        that were planned, else those that are over."""
        planned, taken = self._over
        own = self._planned.get(self.stage)
        if self.done and own:
            return (self._told - self._began) / self.done * self.total / own
        return taken / planned if planned else 1.0


class _Bar(BarColumn):
    """A bar as long as the time that is over."""

    def __init__(self, timeline: Timeline) -> None:
        super().__init__()
        self._timeline = timeline

    def render(self, task: Task) -> ProgressBar:
        task.completed = self._timeline.fraction()
        return super().render(task)


class _Times(ProgressColumn):
    """The time that is over, and what is left."""

    def __init__(self, timeline: Timeline) -> None:
        super().__init__()
        self._timeline = timeline

    def render(self, task: Task) -> Text:
        left = self._timeline.left()
        about = "" if left is None else f", about {clock(left)} left"
        return Text(f"{clock(self._timeline.elapsed())}{about}")


class Bars:
    """The display of a command: called with (stage, done, total), and paused while it asks."""

    def __init__(self, planned: Mapping[str, float]) -> None:
        self._timeline = Timeline(planned)
        console = Console(stderr=True, highlight=False)
        self._display = Progress(
            TextColumn("{task.description}", markup=False),
            _Bar(self._timeline),
            _Times(self._timeline),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._task: TaskID | None = None

    def __enter__(self) -> Bars:
        self._display.start()
        self("start", 0, 1)
        return self

    def __exit__(self, *_: object) -> None:
        self._display.stop()

    def __call__(self, stage: str, done: int, total: int) -> None:
        new = stage != self._timeline.stage
        self._timeline.tell(stage, done, total)
        text = STAGES.get(stage, stage) + (f" {done}/{total}" if total > 1 else "")
        if self._task is None:
            self._task = self._display.add_task(text, total=1.0)
        self._display.update(self._task, description=text, refresh=new)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Take the bar off the screen inside the block, where the user is to type."""
        if self._display.disable:
            yield
            return
        start = time.monotonic()
        self._display.stop()
        try:
            yield
        finally:
            self._timeline.pause(time.monotonic() - start)
            self._display.start()


def clock(seconds: float) -> str:
    """Write seconds as 0:05, 12:34 or 1:02:03."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
