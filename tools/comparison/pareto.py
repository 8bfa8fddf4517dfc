"""What was learnt against what it cost: the cells that no other beats in both, as pictures."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.figure import Figure

from tools.comparison.comparison_table import Row

RESULTS = ("NLL", "exact match, %")
COSTS = ("train time, s", "peak memory, GB")


class Point(NamedTuple):
    """A cell.

    Attributes:
        cost: mean over its seeds.
        result: mean over its seeds.
        name: of the cell.
        spread: standard deviation of the result over the seeds; 0 for a single one.
    """

    cost: float
    result: float
    name: str
    spread: float = 0.0


def front(points: Sequence[Point], *, higher_is_better: bool) -> list[Point]:
    """The points to which no other is equal or better in both cost and result, by rising cost."""
    sign = -1 if higher_is_better else 1
    best: list[Point] = []
    for point in sorted(points, key=lambda point: (point.cost, sign * point.result)):
        if not best or sign * point.result < sign * best[-1].result:
            best.append(point)
    return best


def draw(rows: Sequence[Row], path: Path) -> None:
    """NLL and exact match against train time and peak memory, as far as they were measured."""
    panels = [[(points_of(rows, result, cost), result, cost) for cost in COSTS] for result in RESULTS]
    panels = [kept for panel in panels if (kept := [entry for entry in panel if entry[0]])]
    if not panels:
        return
    shape = len(panels), max(map(len, panels))
    figure = Figure(figsize=(6 * shape[1], 4.5 * shape[0]), layout="constrained")
    for axes, panel in zip(figure.subplots(*shape, squeeze=False), panels, strict=True):
        for axis, (points, result, cost) in zip(axes, panel, strict=True):
            _draw_panel(axis, points, higher_is_better=result != "NLL")
            axis.set(xlabel=cost, ylabel=result)
    figure.savefig(path, dpi=100)


def points_of(rows: Sequence[Row], result: str, cost: str) -> list[Point]:
    """The cells that have both; a result that is no number has no place."""
    points = []
    for row in rows:
        values = row.tested("nll") if result == "NLL" else [100 * share for share in row.tested("accuracy")]
        peak = row.cost("peak_reserved_bytes")
        spent = row.train_seconds if cost == "train time, s" else peak and peak / 1e9
        if values and all(map(math.isfinite, values)) and spent is not None:
            spread = statistics.stdev(values) if len(values) > 1 else 0.0
            points.append(Point(spent, statistics.fmean(values), row.name, spread))
    return points


def _draw_panel(axis: Any, points: Sequence[Point], *, higher_is_better: bool) -> None:
    best = front(points, higher_is_better=higher_is_better)
    steps = [[point.cost for point in best], [point.result for point in best]]
    axis.plot(*steps, color="#dd8452", drawstyle="steps-post", zorder=1)
    for point in points:
        color = "#dd8452" if point in best else "#4c72b0"
        axis.errorbar(point.cost, point.result, yerr=point.spread or None, fmt="o", color=color, zorder=2)
        axis.annotate(point.name, point[:2], xytext=(5, 5), textcoords="offset points", fontsize="small")
    axis.margins(0.15)
    axis.spines[["top", "right"]].set_visible(False)
