"""Records of a comparison that no method made: likeness is what the test says."""

from __future__ import annotations

import torch

from hdbcli.compare.run import Record
from hdbcli.compare.timing import Alone
from hdbcli.config import PROMPTS

ALONE = Alone(startup=5.0, prepare=1.0, first=(), step=0.5, memory=10**9)


def record(truth: torch.Tensor, away: tuple[float, ...]) -> Record:
    """Draw portraits that lie `away` from the truth at each mark."""
    people, shown = len(truth), len(PROMPTS)
    off = torch.zeros(128)
    off[0] = 1
    portraits = torch.stack([truth + distance * off for distance in away])
    scores = torch.eye(shown)[:, None].repeat(1, people, 1)
    return Record(
        marks=torch.tensor([0, 10, 40][: len(away)]),
        portraits=portraits,
        prompted=portraits[-1].expand(shown, -1, -1).clone(),
        found=torch.ones(shown, people, dtype=torch.bool),
        drift=torch.full((people,), 2.0),
        numbers=torch.tensor([7]),
        texts={"t": scores},
        pictures=torch.zeros(shown, people, 8, 8, 3, dtype=torch.uint8),
    )
