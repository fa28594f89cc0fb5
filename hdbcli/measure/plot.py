"""Draw curves, with pictures below them, as one PNG."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np


@dataclass(frozen=True, eq=False)
class Curve:
    """A line of a chart; `low` and `high` bound a band around it.

    A line of one point is drawn with that band as its error bar. A `bound` is what the others lie
    above or below: black, and dashed as it says ("--", ":").
    """

    label: str
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] | None = None
    high: Sequence[float] | None = None
    bound: str = ""


@dataclass(frozen=True)
class Axes:
    """What a chart is of."""

    title: str
    x: str
    y: str
    log_x: bool = False


def save_chart(
    axes: Axes, curves: Sequence[Curve], rows: Sequence[Sequence[np.ndarray]], path: Path
) -> None:
    """Write the chart, and below it each row of uint8 pictures (H, W, 3), as a PNG whatever the
    path's suffix."""
    from matplotlib import color_sequences
    from matplotlib.figure import Figure

    below = len(rows)
    sheet = Figure(figsize=(8, 4.5 + 1.3 * below), dpi=100, layout="constrained")
    parts: Any = sheet.subplots(1 + below, 1, squeeze=False, height_ratios=[4.5] + [1.3] * below)
    chart = parts[0, 0]
    twenty = color_sequences["tab20"]  # in pairs of a colour and its paler one
    chart.set_prop_cycle(color=[*twenty[::2], *twenty[1::2]])  # no colour twice: ten are too few
    for curve in curves:
        look = {"linestyle": curve.bound, "color": "black"} if curve.bound else {}
        marker = "." * (len(curve.x) < 40 and not curve.bound)
        (line,) = chart.plot(curve.x, curve.y, label=curve.label, marker=marker, **look)
        if curve.low is None or curve.high is None:
            continue
        if len(curve.x) == 1:
            chart.vlines(curve.x, curve.low, curve.high, color=line.get_color())
        else:
            chart.fill_between(curve.x, curve.low, curve.high, color=line.get_color(), alpha=0.15)
    chart.set(title=axes.title, xlabel=axes.x, ylabel=axes.y)
    if axes.log_x:
        chart.set_xscale("log")
    chart.grid(alpha=0.3)
    sheet.legend(loc="outside right upper")
    for part, row in zip(parts[1:, 0], rows, strict=True):
        part.imshow(np.hstack(list(row)))
        part.axis("off")
    sheet.savefig(path, format="png")
