"""One display for all stages of a command: the time left is that of all of them."""

from __future__ import annotations

import os
import re
import select
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hdbcli.cli.progress import SECONDS, Timeline, clock

ROOT = Path(__file__).resolve().parents[2]
NEW = {"start": 1, "crop": 1, "load": 1, "predict": 1, "refine": 40, "draw": 100}
STEPS = {"refine": 40, "draw": 50}  # that the stages tell


class Run:
    """A command whose stages take what is said; a clock that only it moves."""

    def __init__(self, planned: dict[str, float], takes: dict[str, float]) -> None:
        self.now, self.takes = 100.0, takes
        self.timeline = Timeline(planned, lambda: self.now)

    def go(self, parts: int = 20) -> list[tuple[str, float, float | None, float]]:
        """Run to the end; return stage, seconds truly left, left as told, and share: after each of
        its steps, or of so many parts of a stage that tells none."""
        end, seen = self.now + sum(self.takes.values()), []
        for stage, takes in self.takes.items():
            steps = STEPS.get(stage, 0)
            self.timeline.tell(stage, 0, steps or 1)
            for step in range(1, (steps or parts) + 1):
                self.now += takes / (steps or parts)
                if steps:
                    self.timeline.tell(stage, step, steps)
                left, share = self.timeline.left(), self.timeline.fraction()
                seen.append((stage, end - self.now, left, share))
        return seen


@pytest.mark.parametrize("slower", [0.5, 1, 4, 30])
def test_the_time_left_is_that_of_all_stages(slower: float) -> None:
    """On a machine, or a base, that is any number of times slower than `tiny` on a laptop."""
    takes = {stage: slower * SECONDS[stage] * n for stage, n in NEW.items()}
    seen = Run(NEW, takes).go()
    for stage, true, told, _ in seen:
        if stage != "start" and true > 0.1 * sum(takes.values()):
            assert told is not None and true / 1.25 < told < true * 1.25, (stage, true, told)
    shares = [share for *_, share in seen]
    assert shares == sorted(shares) and shares[-1] > 0.95
    alone = Run({}, takes).go()  # the control: the time left of each stage alone
    assert {told for stage, _, told, _ in alone if stage == "load"} == {None}
    half = next(each for each in alone if each[0] == "refine" and each[1] < takes["draw"] * 3)
    assert half[2] is not None and half[2] < half[1] / 1.25


def test_a_stage_that_takes_longer_than_planned_shows_its_own_pace() -> None:
    takes = {stage: SECONDS[stage] * n for stage, n in NEW.items()} | {"refine": 400.0}
    seen = Run(NEW, takes).go()
    assert all(told and told > 0 for stage, true, told, _ in seen if stage == "load")
    middle = [(true, told) for stage, true, told, _ in seen if stage == "refine" and true < 300]
    for true, told in middle:
        assert told is not None and true - 5 < told < true + 150  # drawing may be as slow
    shares = [share for *_, share in seen]
    assert shares == sorted(shares)


def test_a_command_that_begins_again_counts_its_stages_again() -> None:
    run = Run(NEW, {})
    for stage in ("start", "load", "refine"):
        run.timeline.tell(stage, 0, 1)
        run.now += SECONDS[stage] * NEW[stage]
    before = run.timeline.left()
    run.timeline.tell("load", 0, 1)  # out of memory, once more by a smaller plan
    after = run.timeline.left()
    assert before is not None and after is not None and after > before + SECONDS["load"]


def test_time_to_answer_a_question_does_not_count() -> None:
    asked, other = Run(NEW, {}), Run(NEW, {})
    for run in (asked, other):
        run.timeline.tell("start", 0, 1)
        run.now += 3
        run.timeline.tell("crop", 0, 1)
    asked.now += 60
    assert asked.timeline.elapsed() == 63  # the control
    asked.timeline.pause(60)
    assert asked.timeline.elapsed() == other.timeline.elapsed() == 3
    assert asked.timeline.left() == other.timeline.left()


def test_seconds_are_written_as_clocks_show_them() -> None:
    assert [clock(each) for each in (0.4, 59.6, 754, 3723)] == ["0:00", "1:00", "12:34", "1:02:03"]


SHOW = """
import sys
import time
from hdbcli.cli import render
try:
    with render.progress(load=1, draw=100) as tell:
        tell("load", 0, 1)
        for step in range(4):
            tell("draw", step, 4)
            time.sleep(0.1)
        if sys.argv[1] == "stop":
            raise KeyboardInterrupt
except KeyboardInterrupt:
    pass
assert "torch" not in sys.modules
print("END")
"""


@pytest.mark.skipif(sys.platform == "win32", reason="this system has no such terminals")
@pytest.mark.parametrize("end", ["done", "stop"])
def test_a_terminal_shows_one_line_and_is_left_clean(end: str) -> None:
    words = [sys.executable, "-c", SHOW, end]
    pipe = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert pipe.returncode == 0 and not pipe.stderr and pipe.stdout == "END\n"  # the control

    screen, terminal = os.openpty()
    env = os.environ | {"TERM": "xterm", "COLUMNS": "100", "NO_COLOR": "1"}
    done = subprocess.Popen(words, cwd=ROOT, stdout=terminal, stderr=terminal, env=env)
    os.close(terminal)
    seen, until = b"", time.monotonic() + 120
    while b"END" not in seen and time.monotonic() < until:
        if select.select([screen], [], [], 1)[0]:
            seen += os.read(screen, 65536)
    assert done.wait(60) == 0
    os.close(screen)
    text = seen.decode()
    stages = r"(starting|loading the base model|drawing \d/4) [━╸╺ ]*\d:\d\d(.*?left)"
    told = re.findall(stages, text)
    assert {stage for stage, _ in told} >= {"starting", "loading the base model", "drawing 0/4"}
    assert all(re.fullmatch(r", about \d:\d\d left", left) for _, left in told)
    drawn = text.partition("END")[0].rpartition("left")[0] + "left"
    assert len(rows(drawn)) == 1  # a stage takes the place of another
    assert rows(text) == ["END"]


def rows(text: str) -> list[str]:
    """Return what a terminal shows of it, without empty lines."""
    shown, row = [""], 0
    for token in re.findall(r"\x1b\[[\d;?]*[A-Za-z]|\r|\n|[^\x1b\r\n]+", text):
        if token == "\n":
            row += 1
            shown += [""] * (row == len(shown))
        elif token.endswith("A") and token.startswith("\x1b"):
            row -= int(token[2:-1] or 1)
        elif token == "\x1b[2K":
            shown[row] = ""
        elif token != "\r" and not token.startswith("\x1b"):
            shown[row] += token
    return [each.strip() for each in shown if each.strip()]
