"""Statistics over people: means with 95 % intervals, and retrieval of people by their faces.

N, M and P count pictures or people, D the numbers of an embedding.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from registry.errors import HdbError

RESAMPLES = 2000


@dataclass(frozen=True)
class Interval:
    """A mean and its 95 % interval over people, as whoever made it estimates that."""

    mean: float
    low: float
    high: float


def bootstrap(values: Tensor) -> Interval:
    """Return the mean of one number a person (P,) and its 95 % interval over resampled people."""
    return bootstrap_ratio(values, torch.ones_like(values))


def bootstrap_ratio(above: Tensor, below: Tensor) -> Interval:
    """Return mean(above) / mean(below), of two numbers a person (P,) each, and its 95 % interval
    over resampled people; NaN where the denominator is not above 0."""
    generator = torch.Generator().manual_seed(0)
    pick = torch.randint(len(above), (RESAMPLES, len(above)), generator=generator)
    ratios = _ratio(above.double()[pick].mean(1), below.double()[pick].mean(1))
    low, high = torch.nanquantile(ratios, torch.tensor([0.025, 0.975], dtype=torch.float64))
    mean = _ratio(above.double().mean(), below.double().mean())
    return Interval(float(mean), float(low), float(high))


def _ratio(above: Tensor, below: Tensor) -> Tensor:
    return torch.where(below > 0, above / below, torch.nan)


def normal_interval(values: Tensor) -> Interval:
    """Return the mean of one number a person (P,) and its 95 % interval, as of a normal law."""
    mean, half = values.mean(), 1.96 * values.std() / len(values) ** 0.5
    return Interval(float(mean), float(mean - half), float(mean + half))


@dataclass(frozen=True)
class Lookup:
    """How each of N queries finds its person: first, among the first five, and the share of the
    others that it is farther from than from its own."""

    first: Tensor  # (N,) 0 or 1
    five: Tensor  # (N,) 0 or 1
    auc: Tensor  # (N,) 0..1


def look_up(queries: Tensor, gallery: Tensor, owners: Tensor | None = None) -> Lookup:
    """Look each query (N, D) up in the gallery (M, D); query i is of person `owners[i]` of it, or
    of person i.

    Compare by cosine after taking each set's mean away, since what a style or a camera adds to all
    pictures of a set says nothing about a person. Ties count against the query, in the AUC half. A
    row of NaN is a picture without a face: as a query it finds no one, in the gallery it is not
    found it.
    """
    count = len(queries)
    if owners is None:
        owners = torch.arange(count)
    if len(gallery) < 2 or (count and int(owners.max()) >= len(gallery)):
        raise HdbError(
            f"retrieval needs two people at least, all of them in the gallery; got {count} queries "
            f"and {len(gallery)} in the gallery"
        )
    if queries.isinf().any() or gallery.isinf().any():
        raise HdbError("retrieval got embeddings that are not finite; check the generated pictures")
    q, g = (F.normalize(x - x.nanmean(0), dim=1) for x in (queries.double(), gallery.double()))
    cosine = q @ g.T
    seen = cosine.isfinite()
    cosine = cosine.where(seen, -2.0)  # farther than any face
    rows = torch.arange(count)
    own = cosine[rows, owners][:, None]
    apart = torch.ones_like(seen)
    apart[rows, owners] = False
    others = cosine[apart].view(count, -1)
    missed = ~seen[rows, owners]
    rank = (others >= own).sum(1)
    auc = (own > others).double().mean(1) + (own == others).double().mean(1) / 2
    first, five = ((rank < near) & ~missed for near in (1, 5))  # of four people all are in five
    return Lookup(first.double(), five.double(), auc.masked_fill(missed, 0.0))


@dataclass(frozen=True)
class Found:
    """How well pictures find their person, with intervals over people; see Lookup."""

    first: Interval
    five: Interval
    auc: Interval


def find(pictures: Tensor, gallery: Tensor) -> tuple[Found, Tensor]:
    """Look up K pictures of each of P people (P, K, D), the first P of the gallery (M, D); return
    also which find their person among the first five (P, K)."""
    people, each = pictures.shape[:2]
    owners = torch.arange(people).repeat_interleave(each)
    told = look_up(pictures.flatten(0, 1), gallery, owners)
    rows = [row.view(people, each) for row in (told.first, told.five, told.auc)]
    return Found(*(bootstrap(row.mean(1)) for row in rows)), rows[1]


@dataclass(frozen=True)
class Retrieval:
    """How well pictures find their person: first, among the first five, before another person."""

    top1: float
    top5: float
    auc: float


def retrieval(queries: Tensor, gallery: Tensor) -> Retrieval:
    """Look each query (N, D) up in the gallery (M, D), where row i of both is person i; M >= N."""
    if len(queries) < 2:
        raise HdbError(f"retrieval needs two people at least; got {len(queries)} queries")
    told = look_up(queries, gallery)
    return Retrieval(*(float(each.mean()) for each in (told.first, told.five, told.auc)))
