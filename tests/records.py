"""Records of a comparison that no method made: likeness is what the test says."""

from __future__ import annotations

import torch

from hdbcli.compare.results import Bounds, Judge, likeness_of
from hdbcli.compare.run import Record
from hdbcli.compare.timing import Alone
from hdbcli.config import PROMPTS
from hdbcli.measure.metrics import FACE, FaceMetric

ALONE = Alone(startup=5.0, prepare=1.0, first=(), step=0.5, memory=10**9)
OFF = torch.zeros(128)
OFF[0] = 1
DRAWN = 2


def record(truth: torch.Tensor, away: float, steps: int = 40) -> Record:
    """Draw two of every picture that lie `away` from the truth, a little nearer and farther."""
    people, shown = len(truth), len(PROMPTS)
    near = [truth + (away + more) * OFF for more in (-0.05, 0.05)]
    scores = torch.eye(shown)[:, None, None].repeat(1, people, DRAWN, 1)
    return Record(
        steps=torch.tensor([steps]),
        faces={FACE: torch.stack(near, 1).expand(shown, -1, -1, -1).clone()},
        found=torch.ones(shown, people, DRAWN, dtype=torch.bool),
        drift=torch.full((people,), 2.0),
        numbers=torch.tensor([7]),
        texts={"t": scores},
        pictures=torch.zeros(shown, people, 8, 8, 3, dtype=torch.uint8),
    )


def judge(truth: torch.Tensor) -> Judge:
    """Judge by dlib; the base's own portraits lie 0.8 away and another true photo 0.1."""
    metric = FaceMetric()
    rows = (likeness_of(metric, (truth + away * OFF)[:, None], truth) for away in (0.8, 0.2, 0.1))
    return Judge(FACE, metric, truth, Bounds(*rows))
