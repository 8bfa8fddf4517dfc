"""Curves of runs, and what they gained against what they cost: figures for one paper, of any length of run."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from agsel.monitor.pictures import LIGHT, SERIES, Paper, canvas
from agsel.report import wording
from agsel.report.final_numbers import eval_loss, host_gigabytes, loss, peak_gigabytes, tasks_of, training_seconds
from agsel.report.run_files import Run

if TYPE_CHECKING:  # matplotlib is imported where something is drawn
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

POINTS = 400
"""Most of a line: as many as a picture can show. More are put together."""
FEW = 40
"""So few points are marked each."""
DASHES = ("-", "--", "-.", ":")
MARKS = "osD^vPX*"
NAME_LENGTH = 34
WIDTH, HEIGHT, LINE_OF_LEGEND = 4.8, 2.7, 0.2
"""In inches."""
UNITS_OF_TIME = (("hours", 3600.0), ("minutes", 60.0), ("seconds", 1.0))


@dataclass(frozen=True)
class Subject:
    """What a picture of curves is about.

    Attributes:
        title: of the picture.
        unit: of its numbers.
        names: in the metrics, by what the line is called.
        compared: those that are drawn when runs are compared.
        from_zero: whether the axis begins there, as it does for what is used up.
    """

    title: str
    unit: str
    names: dict[str, str]
    compared: tuple[str, ...]
    from_zero: bool = False


SUBJECTS = (
    Subject("Loss", "loss", {"training": "loss", "evaluation": "eval_loss"}, ("training", "evaluation")),
    Subject("Learning rate", "learning rate", {"learning rate": "learning_rate"}, ("learning rate",)),
    Subject(
        "Throughput", "tokens per second", {"all ranks": "speed/tokens_per_second"}, ("all ranks",), from_zero=True
    ),
    Subject(
        "Time per step",
        "milliseconds per step",
        {"step": "speed/ms_per_step", "waiting for rows": "speed/data_ms", "waiting for states": "speed/exposed_ms"},
        ("step",),
        from_zero=True,
    ),
    Subject(
        "Memory",
        "GB",
        {"device, peak": "memory/peak_gb", "host": "memory/host_gb"},
        ("device, peak", "host"),
        from_zero=True,
    ),
)


@dataclass(frozen=True)
class Line:
    """A curve: points, and between which values those lay that a point stands for."""

    name: str
    x: np.ndarray[Any, Any]
    y: np.ndarray[Any, Any]
    low: np.ndarray[Any, Any]
    high: np.ndarray[Any, Any]

    @classmethod
    def of(cls, name: str, x: Sequence[float], y: Sequence[float]) -> Line:
        """With means of neighbours where there are more points than a picture can show."""
        parts = min(POINTS, len(y))
        columns = np.array_split(np.asarray(y, float), parts)
        return cls(
            name,
            np.array([part.mean() for part in np.array_split(np.asarray(x, float), parts)]),
            *(np.array([reduce(part) for part in columns]) for reduce in (np.mean, np.min, np.max)),
        )


@dataclass(frozen=True)
class Point:
    """What something cost and what it came to, a run for example."""

    name: str
    cost: float
    result: float


AnyPoint = TypeVar("AnyPoint", bound=Point)


@dataclass(frozen=True)
class Trade:
    """What runs came to against what they cost.

    Attributes:
        result: what `Point.result` is.
        cost: what `Point.cost` is, with its unit.
        higher_is_better: of the result.
        points: one for each run that has both, None for one that has not.
    """

    result: str
    cost: str
    higher_is_better: bool
    points: Sequence[Point | None]

    @property
    def front(self) -> list[Point]:
        """As of `front`."""
        return front((point for point in self.points if point is not None), higher_is_better=self.higher_is_better)


def front(points: Iterable[AnyPoint], *, higher_is_better: bool) -> list[AnyPoint]:
    """The points to which no other is equal or better in both cost and result (Pareto's front), by rising cost."""
    sign = -1 if higher_is_better else 1
    best: list[AnyPoint] = []
    for point in sorted(points, key=lambda point: (point.cost, sign * point.result)):
        if not best or sign * point.result < sign * best[-1].result:
            best.append(point)
    return best


def subjects_of(runs: Sequence[Run]) -> list[Subject]:
    """Those of all runs, and of the tasks on which these were judged."""
    accuracies = tasks_of(runs)
    unit = "share of right answers" if len(accuracies) > 1 else f"share of right answers, {''.join(accuracies)}"
    tasks = Subject("Accuracy", unit, accuracies, tuple(accuracies))
    return [SUBJECTS[0], tasks, *SUBJECTS[1:]]


def lines_of_run(run: Run, subject: Subject) -> list[Line]:
    """The curves of a run over its steps that belong to a subject, without those it has not measured."""
    curves = {called: run.curve(name, "step") for called, name in subject.names.items()}
    return [Line.of(called, *points) for called, points in curves.items() if points[0]]


def lines_of_runs(runs: Iterable[Run], name: str, over: str) -> list[Line]:
    """The curve of a number for each run; an empty one where it was not measured, so that colours stay."""
    curves = ((run.label, run.curve(name, over)) for run in runs)
    return [Line.of(label, *points) if points[0] else Line(label, *[np.empty(0)] * 4) for label, points in curves]


def time_unit(longest: float) -> tuple[str, float]:
    """Name and seconds of the unit in which so many seconds are best read."""
    return next((unit for unit in UNITS_OF_TIME if longest >= 2 * unit[1]), UNITS_OF_TIME[-1])


def draw_lines(lines: Sequence[Line], subject: Subject, axis: str, paper: Paper = LIGHT, *, scale: float = 1) -> Figure:
    """Curves in one picture; a legend above tells several apart, by dashes too.

    Args:
        lines: to draw; empty ones keep their colour.
        subject: of them.
        axis: name of the horizontal axis.
        paper: to draw on.
        scale: by which horizontal positions are divided.
    """
    rows = sum(1 for line in lines if line.x.size) if len(lines) > 1 else 0
    figure, axes = canvas(paper, width=WIDTH, height=HEIGHT + LINE_OF_LEGEND * math.ceil(rows / 2))
    for index, line in enumerate(lines):
        if line.x.size:
            _draw_line(axes, line, index, line.x / scale)
    if subject.from_zero:
        axes.set_ylim(0, 1.1 * max(float(np.nanmax(line.high)) for line in lines if line.x.size) or 1)
    _finish(figure, axes, paper, axis, subject.unit, has_legend=rows > 0)
    return figure


def draw_trade(trade: Trade, paper: Paper = LIGHT) -> Figure:
    """Runs as points; a line joins those that no other beats in both."""
    known = [point for point in trade.points if point is not None]
    figure, axes = canvas(paper, width=WIDTH, height=HEIGHT + LINE_OF_LEGEND * math.ceil((len(known) + 1) / 2))
    best = trade.front
    axes.plot(
        [point.cost for point in best], [point.result for point in best], drawstyle="steps-post", color=paper.ink,
        linewidth=1, linestyle="--", label="not beaten in both", zorder=1,
    )  # fmt: skip
    for index, point in enumerate(trade.points):
        if point is not None:
            colour, mark = SERIES[index % len(SERIES)], MARKS[index % len(MARKS)]
            axes.plot(point.cost, point.result, mark, color=colour, markersize=7, label=_short(point.name))
    axes.margins(0.15)
    axes.locator_params(nbins=5)
    _finish(figure, axes, paper, trade.cost, trade.result, has_legend=True)
    return figure


def trades_of(runs: Sequence[Run]) -> list[Trade]:
    """Accuracies and losses against time and memory, as far as at least two runs have both."""
    results: dict[str, tuple[Any, bool]] = {
        f"accuracy on {task}": ((lambda run, name=name: run.last(name)), True) for task, name in tasks_of(runs).items()
    }
    measured = eval_loss if any(eval_loss(run) is not None for run in runs) else loss
    results["evaluation loss" if measured is eval_loss else "loss"] = measured, False
    memory = peak_gigabytes if any(map(peak_gigabytes, runs)) else host_gigabytes
    unit, scale = time_unit(max((training_seconds(run) or 0 for run in runs), default=0))
    costs: dict[str, Any] = {
        f"training time, {unit}": lambda run: _over(training_seconds(run), scale),
        f"{'peak device' if memory is peak_gigabytes else 'host'} memory, GB": memory,
    }
    trades = [
        Trade(result, cost, higher, [_point(run, spent(run), gained(run)) for run in runs])
        for result, (gained, higher) in results.items()
        for cost, spent in costs.items()
    ]
    return [trade for trade in trades if sum(point is not None for point in trade.points) > 1]


def describe_lines(lines: Sequence[Line], unit: str) -> str:
    """The curves in words: where each begins and ends."""
    ends = [
        f"{line.name} from {wording.number(line.y[0])} to {wording.number(line.y[-1])}" for line in lines if line.y.size
    ]
    return f"{unit}: {'; '.join(ends)}"


def describe_trade(trade: Trade) -> str:
    """The points in words, and which of them are the best."""
    points = [
        f"{point.name} {wording.number(point.result)} at {wording.number(point.cost)}"
        for point in trade.points
        if point is not None
    ]
    best = ", ".join(point.name for point in trade.front)
    return f"{trade.result} against {trade.cost}: {'; '.join(points)}. Not beaten in both: {best}"


def _over(value: float | None, scale: float) -> float | None:
    return None if value is None else value / scale


def _point(run: Run, cost: float | None, result: float | None) -> Point | None:
    return None if cost is None or result is None else Point(run.label, cost, result)


def _short(name: str) -> str:
    """Of a long name both ends. To matplotlib `$` begins a formula, and a name that begins with `_` is hidden."""
    half = NAME_LENGTH // 2
    cut = name if len(name) <= NAME_LENGTH else f"{name[: half - 1]}…{name[-half:]}"
    return (" " if cut.startswith("_") else "") + cut.replace("$", r"\$")


def _draw_line(axes: Axes, line: Line, index: int, x: np.ndarray[Any, Any]) -> None:
    colour, dashes = SERIES[index % len(SERIES)], DASHES[index % len(DASHES)]
    if not np.array_equal(line.low, line.high):
        axes.fill_between(x, line.low, line.high, color=colour, alpha=0.2, linewidth=0)
    mark = MARKS[index % len(MARKS)] if x.size <= FEW else None
    axes.plot(x, line.y, dashes, color=colour, marker=mark, markersize=3.5, linewidth=1.5, label=_short(line.name))


def _finish(figure: Figure, axes: Axes, paper: Paper, x: str, y: str, *, has_legend: bool) -> None:
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(color=paper.grid, linewidth=0.6)
    axes.set_axisbelow(True)
    if has_legend:
        figure.legend(loc="outside upper left", ncols=2, frameon=False, labelcolor=paper.ink, handlelength=2.6)
