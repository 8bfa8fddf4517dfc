"""What was learnt against what it cost: the cells that no other beats in both, as pictures."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from tools.comparison.comparison_table import Row

Point = tuple[float, float, str]
"""Cost, result, and whose they are."""


def front(points: Sequence[Point], *, higher_is_better: bool) -> list[Point]:
    """The points to which no other is equal or better in both cost and result, by rising cost."""
    sign = -1 if higher_is_better else 1
    best: list[Point] = []
    for point in sorted(points, key=lambda point: (point[0], sign * point[1])):
        if not best or sign * point[1] < sign * best[-1][1]:
            best.append(point)
    return best


def draw(rows: Sequence[Row], path: Path) -> None:
    """NLL and exact match against train time and peak memory, as far as they were measured."""
    panels = [
        (points, result, cost)
        for result in ("NLL", "exact match, %")
        for cost in ("train time, s", "peak memory, GB")
        if (points := points_of(rows, result, cost))
    ]
    if not panels:
        return
    figure = Figure(figsize=(6 * len(panels), 4.5), layout="constrained")
    for axis, (points, result, cost) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        _draw_panel(axis, points, higher_is_better=result != "NLL")
        axis.set_xlabel(cost)
        axis.set_ylabel(result)
    figure.savefig(path, dpi=150)


def points_of(rows: Sequence[Row], result: str, cost: str) -> list[Point]:
    """The cells that have both."""
    points = []
    for row in rows:
        values = row.tested("nll") if result == "NLL" else [100 * share for share in row.tested("accuracy")]
        peak = row.cost("peak_reserved_bytes")
        spent = row.train_seconds if cost == "train time, s" else peak and peak / 1e9
        if values and spent is not None:
            points.append((spent, statistics.fmean(values), row.name))
    return points


def _draw_panel(axis: Any, points: Sequence[Point], *, higher_is_better: bool) -> None:
    best = front(points, higher_is_better=higher_is_better)
    axis.plot([x for x, *_ in best], [y for _, y, _ in best], color="#dd8452", drawstyle="steps-post", zorder=1)
    for point in points:
        x, y, name = point
        axis.scatter(x, y, color="#dd8452" if point in best else "#4c72b0", zorder=2)
        axis.annotate(name, (x, y), xytext=(4, 4), textcoords="offset points", fontsize="small")
    axis.margins(0.15)
    axis.spines[["top", "right"]].set_visible(False)
