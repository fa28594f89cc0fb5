"""Say how sure a figure is, and how well pictures find their person: intervals and retrieval.

N, M and P count pictures or people; an embedding has 128 numbers.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from hdbcli.errors import HdbError

RESAMPLES = 2000


@dataclass(frozen=True)
class Retrieval:
    """How well pictures find their person: first, among the first five, before another person."""

    top1: float
    top5: float
    auc: float


def retrieval(queries: Tensor, gallery: Tensor) -> Retrieval:
    """Look each query (N, 128) up in the gallery (M, 128), where row i of both is person i; M >= N.

    Compare by cosine after taking each set's mean away, since what a style or a camera adds to all
    pictures of a set says nothing about a person. Ties count against the query, in the AUC half.
    """
    count = len(queries)
    if count < 2 or len(gallery) < count:
        raise HdbError(
            f"retrieval needs two people at least, all of them in the gallery; got {count} queries "
            f"and {len(gallery)} in the gallery"
        )
    if not (queries.isfinite().all() and gallery.isfinite().all()):
        raise HdbError("retrieval got embeddings that are not finite; check the generated pictures")
    q, g = (F.normalize(x - x.mean(0), dim=1) for x in (queries.double(), gallery.double()))
    cosine = q @ g.T
    own = cosine.diagonal()[:, None]
    others = cosine[~torch.eye(*cosine.shape, dtype=torch.bool)].view(count, -1)
    rank = (others >= own).sum(1)
    auc = (own > others).double().mean() + (own == others).double().mean() / 2
    return Retrieval(
        float((rank < 1).double().mean()), float((rank < 5).double().mean()), float(auc)
    )


@dataclass(frozen=True)
class Interval:
    """A mean and its 95 % interval over people, as whoever made it estimates that."""

    mean: float
    low: float
    high: float


def _interval(differences: Tensor) -> Interval:
    mean, half = differences.mean(), 1.96 * differences.std() / len(differences) ** 0.5
    return Interval(float(mean), float(mean - half), float(mean + half))


def likeness_of(embeddings: Tensor, truth: Tensor) -> Tensor:
    """Return 1 - distance of each picture (P, 128) to its person's photo, at least 0: (P,).

    `truth` may hold more people, who were not drawn.
    """
    return (1 - (embeddings - truth[: len(embeddings)]).norm(dim=1)).clamp(min=0)


def bootstrap(values: Tensor) -> Interval:
    """Return the mean of one number a person (P,) and its 95 % interval over resampled people."""
    generator = torch.Generator().manual_seed(0)
    pick = torch.randint(len(values), (RESAMPLES, len(values)), generator=generator)
    means = values.double()[pick].mean(1)
    low, high = torch.quantile(means, torch.tensor([0.025, 0.975], dtype=torch.float64))
    return Interval(float(values.double().mean()), float(low), float(high))
