"""Draw the batch of a training step: people, the photo that is read of each, what is drawn of them,
the seeds of noise, and times."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from hdbcli.training.objective import DRAWS
from hdbcli.training.people import People
from hdbcli.training.refine import draw_times
from registry.seeds import noise_of


class Batch(NamedTuple):
    """What a step draws for each of P people: which photo is read, and the K pictures drawn."""

    person: Tensor  # (P,)
    read: Tensor  # (P,) the photo that the hypernetwork reads
    mirror: Tensor  # (P,) in 0..1: half of the people are read and drawn mirrored
    drawn: Tensor  # (P, K) others of the person; the last half in styles, where there are such
    others: Tensor  # (P, K) random people, for prior preservation
    empty: Tensor  # (P, K) which of those have an empty prompt
    seed: Tensor  # (P, K) of the noise, which `noises` draws: each process that of its own people
    t: Tensor  # (P, K)

    def part(self, rows: slice) -> Batch:
        """Return what was drawn for some of the people."""
        return Batch(*(each[rows] for each in self))

    def noises(self, shape: Sequence[int]) -> Tensor:
        """Return noise (P, K, c, h, w) for latents of a shape (c, h, w)."""
        seeds = self.seed.flatten().tolist()
        noise = noise_of((torch.Generator().manual_seed(seed) for seed in seeds), shape)
        return noise.view(*self.seed.shape, *shape)


def draw_batch(people: People, count: int, generator: torch.Generator) -> Batch:
    """Draw `count` people and DRAWS pictures of each."""
    person = torch.randint(len(people.names), (count,), generator=generator)
    read, drawn = [], []
    for index in person.tolist():
        photos = people.members[index]
        first, turn = torch.randint(1 << 30, (2,), generator=generator).tolist()
        others = max(1, len(photos) - 1)
        steps = [1 + (turn + k) % others for k in range(DRAWS)]
        pictures = [photos[(first + step) % len(photos)] for step in steps]
        styled = people.styled[index] if people.styled else ()
        if styled:
            plain = DRAWS - DRAWS // 2
            pictures[plain:] = [styled[(turn + k) % len(styled)] for k in range(DRAWS // 2)]
        read.append(photos[first % len(photos)])
        drawn.append(pictures)
    everything = people.everything
    many = count, DRAWS
    # Parts of 0..1 come in order: unshuffled, plain portraits would get all the little noise.
    times = draw_times(count * DRAWS, generator)
    times = times[torch.randperm(len(times), generator=generator)]
    return Batch(
        person,
        torch.tensor(read),
        torch.rand(count, generator=generator),
        torch.tensor(drawn),
        torch.from_numpy(everything)[torch.randint(len(everything), many, generator=generator)],
        torch.rand(many, generator=generator) < 0.5,
        torch.randint(1 << 62, many, generator=generator),
        times.view(many),
    )
