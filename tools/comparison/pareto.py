"""What was learnt against what it cost: the cells that no other beats in both, as pictures."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from agsel.report.charts import Point, front
from tools.comparison.comparison_table import Row

RESULTS = ("NLL", "exact match, %")
COSTS = ("train time, s", "peak memory, GB")


@dataclass(frozen=True)
class CellPoint(Point):
    """Means of a cell over its seeds.

    Attributes:
        spread: standard deviation of the result over the seeds; 0 for a single one.
    """

    spread: float = 0.0


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


def points_of(rows: Sequence[Row], result: str, cost: str) -> list[CellPoint]:
    """The cells that have both; a result that is no number has no place."""
    points = []
    for row in rows:
        values = row.tested("nll") if result == "NLL" else [100 * share for share in row.tested("accuracy")]
        peak = row.cost("peak_reserved_bytes")
        spent = row.train_seconds if cost == "train time, s" else peak and peak / 1e9
        if values and all(map(math.isfinite, values)) and spent is not None:
            spread = statistics.stdev(values) if len(values) > 1 else 0.0
            points.append(CellPoint(row.name, spent, statistics.fmean(values), spread))
    return points


def _draw_panel(axis: Any, points: Sequence[CellPoint], *, higher_is_better: bool) -> None:
    best = front(points, higher_is_better=higher_is_better)
    steps = [[point.cost for point in best], [point.result for point in best]]
    axis.plot(*steps, color="#dd8452", drawstyle="steps-post", zorder=1)
    for point in points:
        color = "#dd8452" if point in best else "#4c72b0"
        place = point.cost, point.result
        axis.errorbar(*place, yerr=point.spread or None, fmt="o", color=color, zorder=2)
        axis.annotate(point.name, place, xytext=(5, 5), textcoords="offset points", fontsize="small")
    axis.margins(0.15)
    axis.spines[["top", "right"]].set_visible(False)
