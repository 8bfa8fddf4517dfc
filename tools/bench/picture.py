"""What was measured, as bars."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tools.bench.compared_methods import METHODS
from tools.bench.rows import PHASES, Row, configuration_of, groups

COLOURS = dict(zip(PHASES, ("#4c72b0", "#dd8452", "#55a868"), strict=True))
UNDIVIDED, MEMORY = "#8c8c8c", "#8172b3"


def draw(rows: Sequence[Row], path: Path) -> None:
    """Time by phase and peak memory of every group, as horizontal bars."""
    try:
        from matplotlib.figure import Figure
        from matplotlib.layout_engine import ConstrainedLayoutEngine
    except ImportError:
        print("no picture without matplotlib: pip install 'agsel[bench]', then --table_only")
        return
    grouped = groups(row for row in rows if not row["error"])
    if not grouped:
        return
    heights = [len(members) + 1.5 for members in grouped.values()]
    figure = Figure(figsize=(11, 0.3 * sum(heights) + 0.8), layout=ConstrainedLayoutEngine(w_pad=0.12))
    axes = figure.subplots(len(grouped), 2, squeeze=False, height_ratios=heights)
    for (times, memory), (title, members) in zip(axes, grouped.items(), strict=True):
        draw_group(times, memory, title, members)
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside upper right", ncols=3, frameon=False)
    figure.suptitle("bold: agsel's methods", x=0.01, ha="left", fontsize="small", fontweight="bold")
    figure.savefig(path, dpi=150)


def draw_group(times: Any, memory: Any, title: str, rows: Sequence[Row]) -> None:
    """The bars of rows that may be compared, on two axes."""
    labels = [configuration_of(row).label for row in rows]
    peaks = [(row["peak_bytes"] or 0) / 1e9 for row in rows]
    _draw_phases(times, labels, rows)
    memory.barh(labels, peaks, color=MEMORY)
    times.set_title(f"{title}: ms/step", fontsize="small", loc="left")
    memory.set_title("peak GB per GPU", fontsize="small", loc="left")
    for axis, lengths in ((times, [row["ms_per_step"] for row in rows]), (memory, peaks)):
        _dress(axis, lengths, rows)


def _draw_phases(axis: Any, labels: Sequence[str], rows: Sequence[Row]) -> None:
    left = [0.0] * len(rows)
    for phase, colour in COLOURS.items():
        widths = [phase_widths(row)[phase] for row in rows]
        axis.barh(labels, widths, left=left, color=colour, label=phase.removesuffix("_ms"))
        left = [start + width for start, width in zip(left, widths, strict=True)]
    axis.barh(labels, [row["ms_per_step"] - drawn for row, drawn in zip(rows, left, strict=True)], color=UNDIVIDED)


def phase_widths(row: Row) -> dict[str, float]:
    """Each phase's share of the median step: the medians of the phases do not sum to it. Zeros without phases."""
    times = {phase: row[phase] or 0.0 for phase in PHASES}
    scale = row["ms_per_step"] / (sum(times.values()) or 1)
    return {phase: time * scale for phase, time in times.items()}


def _dress(axis: Any, lengths: Sequence[float], rows: Sequence[Row]) -> None:
    """Numbers at the ends of the bars, names of agsel's methods in bold, the first row on top."""
    for position, length in enumerate(lengths):
        axis.text(length, position, f" {length:.3g}", va="center", fontsize="x-small")
    axis.set_xlim(0, 1.1 * max(lengths) or 1)
    axis.invert_yaxis()
    axis.tick_params(labelsize="small")
    for label, row in zip(axis.get_yticklabels(), rows, strict=True):
        label.set_fontweight("bold" if METHODS[row["method"]].moves_states else "normal")
    axis.spines[["top", "right"]].set_visible(False)
