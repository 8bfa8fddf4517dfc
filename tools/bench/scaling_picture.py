"""How methods scale over GPUs, as lines."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from tools.bench.configurations import Configuration
from tools.bench.series import FULL, Series

MARKERS = {1: "o", 2: "s", 3: "^"}
IDEAL = "ideal: in proportion\nto the GPUs"


def draw(kinds: dict[str, list[Series]], path: Path) -> None:
    """Tokens per second of all GPUs together: one row of axes for each kind of scaling, one column for each model."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print("no picture without matplotlib: pip install 'agsel[bench]'")
        return
    drawn = {name: series for name, series in kinds.items() if series}
    models = list(dict.fromkeys(one.configuration.model for series in drawn.values() for one in series))
    if not models:
        return
    figure = Figure(figsize=(3.2 * len(models) + 1.6, 2.8 * len(drawn)), layout="constrained")
    grid = figure.subplots(len(drawn), len(models), squeeze=False, sharex=True, sharey="col")
    for axes, (name, series) in zip(grid, drawn.items(), strict=True):
        _draw_kind(axes, name, series, models)
    for axis in grid[-1]:
        axis.set_xlabel("GPUs")
    named = _lines_by_label(axis for axes in grid for axis in axes)
    figure.legend(named.values(), named.keys(), loc="outside right center", frameon=False)
    figure.savefig(path, dpi=150)


def _draw_kind(axes: Sequence[Any], name: str, series: Sequence[Series], models: Sequence[str]) -> None:
    for axis, model in zip(axes, models, strict=True):
        draw_model(axis, [one for one in series if one.configuration.model == model])
        axis.set_title(model, fontsize="small", loc="left")
    axes[0].set_ylabel(f"{title(name, series)}\n1000 tokens/s, all GPUs")


def _lines_by_label(axes: Iterable[Any]) -> dict[str, Any]:
    """What the legend says, the ideal last."""
    lines = {line.get_label(): line for axis in axes for line in axis.lines}
    named = {label: line for label, line in lines.items() if not label.startswith("_")}
    return named | {IDEAL: named.pop(IDEAL)}


def title(name: str, series: Iterable[Series]) -> str:
    """`weak: 8 rows per GPU`; the rows are left out where series differ in them."""
    counts = {one.equal_rows(name) for one in series}
    rows = f"{min(counts)} rows" if len(counts) == 1 else "equal rows"
    return f"{name}: {rows} {'per GPU' if name == 'weak' else 'in all'}"


def draw_model(axis: Any, series: Sequence[Series]) -> None:
    """The lines of one model, each with its ideal."""
    for one in series:
        speeds = [ranks * row["tokens_per_second"] / 1000 for ranks, row in one.rows.items()]
        axis.axline((0, 0), (min(one.rows), speeds[0]), color="0.75", linewidth=0.7, zorder=1, label=IDEAL)
        axis.plot(list(one.rows), speeds, **_style(one.configuration))
    counts = sorted({ranks for one in series for ranks in one.rows})
    axis.set_xticks(counts)
    axis.set_xlim(0, 1.05 * counts[-1])
    axis.set_ylim(bottom=0, auto=True)
    axis.grid(alpha=0.3)
    axis.spines[["top", "right"]].set_visible(False)


def _style(one: Configuration) -> dict[str, Any]:
    """Stages differ in colour and marker, full fine-tuning and states that stay in their line."""
    return {
        "label": f"ZeRO-{one.stage} {one.label}",
        "linestyle": "--" if one.method == FULL else "-" if one.offload_states else ":",
        "color": f"C{one.stage - 1}",
        "marker": MARKERS[one.stage],
        "markerfacecolor": "none",
        "markersize": 6,
    }
