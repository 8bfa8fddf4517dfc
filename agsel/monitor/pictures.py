"""Pictures of a run's selection, of any length: whole runs are binned to the width of a page."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from agsel.monitor.history import SelectionHistory

if TYPE_CHECKING:  # matplotlib is imported where something is drawn: it takes half a second
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLUMNS = 480
"""Most columns of a map; more steps than these are put together."""
NAMES_SHOWN = 24
COLOURS = "cividis"
"""From dark to light for everyone, whatever colours they see."""
SERIES = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#999999", "#F0E442")
"""Of lines, by Okabe and Ito, that colour-blind people can tell apart."""


@dataclass(frozen=True)
class Paper:
    """Colours of what is drawn on and with."""

    ground: str = "#ffffff"
    ink: str = "#1f2328"
    grid: str = "#d0d7de"
    missing: str = "#e6e6e6"


LIGHT, DARK = Paper(), Paper(ground="#0d1117", ink="#e6edf3", grid="#30363d", missing="#21262d")


def selection_map(history: SelectionHistory, paper: Paper = LIGHT) -> Figure:
    """Blocks x steps: in which share of the steps of a column each block was trained."""
    return _map(history, trained_share(history), "share of steps in which a block was trained", paper, limits=(0, 1))


def norm_map(history: SelectionHistory, paper: Paper = LIGHT) -> Figure:
    """Blocks x steps: gradient norms as they were measured, in a logarithmic scale."""
    from matplotlib.colors import LogNorm

    norms = norm_levels(history)
    known = norms[np.isfinite(norms) & (norms > 0)]
    low, high = (float(known.min()), float(known.max())) if known.size else (0.1, 1.0)
    scale = LogNorm(low, high if high > low else low * 10)
    return _map(history, norms, "gradient norm of a block, where it was measured", paper, norm=scale)


def count_bars(history: SelectionHistory, paper: Paper = LIGHT) -> Figure:
    """How many steps have trained each block, by depth."""
    return bars_of(history.counts(), paper)


def bars_of(counts: Mapping[str, int], paper: Paper = LIGHT) -> Figure:
    """The same of counts that are known without the history."""
    figure, axes = canvas(paper, height=0.9 + 0.16 * min(len(counts), 40))
    axes.barh(range(len(counts)), list(counts.values()), color=SERIES[0])
    _name_blocks(axes, tuple(counts))
    axes.set_ylim(-0.5, len(counts) - 0.5)
    axes.set_xlabel("steps in which the block was trained")
    axes.grid(axis="x", color=paper.grid)
    axes.set_axisbelow(True)
    return figure


def trained_share(history: SelectionHistory) -> np.ndarray[Any, np.dtype[Any]]:
    """[blocks, columns]: share of the steps of each column that trained the block."""
    matrix = history.trained().astype(float)
    return np.stack([part.mean(axis=1) for part in _columns(matrix)], axis=1) if matrix.size else matrix


def norm_levels(history: SelectionHistory) -> np.ndarray[Any, np.dtype[Any]]:
    """[blocks, columns]: geometric means of the norms measured in each column, NaN where there are none."""
    matrix = history.measured().astype(float)
    if not matrix.size:
        return matrix
    logarithms = np.log(np.where(matrix > 0, matrix, np.nan))
    known = [(part, np.isfinite(part)) for part in _columns(logarithms)]
    sums = [np.where(mask, part, 0).sum(axis=1) for part, mask in known]
    numbers = [mask.sum(axis=1) for _, mask in known]
    with np.errstate(invalid="ignore"):
        return np.exp(np.stack(sums, axis=1) / np.stack(numbers, axis=1))


def png(figure: Figure, dpi: int = 110) -> bytes:
    """The picture as a file, with so many pixels per inch."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    file = io.BytesIO()
    figure.set_dpi(dpi)
    FigureCanvasAgg(figure).print_png(file)  # savefig draws twice, the first time to lay the parts out
    return file.getvalue()


def canvas(paper: Paper = LIGHT, *, width: float = 8.0, height: float = 3.2) -> tuple[Figure, Axes]:
    """A figure of so many inches with one pair of axes, on this paper."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained", facecolor=paper.ground)
    axes = figure.add_subplot()
    ink_axes(axes, paper)
    return figure, axes


def ink_axes(axes: Axes, paper: Paper) -> None:
    """Draw axes, their numbers and their names with the ink of the paper."""
    axes.set_facecolor(paper.ground)
    axes.tick_params(colors=paper.ink, which="both")
    for part in (axes.xaxis.label, axes.yaxis.label, axes.title):
        part.set_color(paper.ink)
    for spine in axes.spines.values():
        spine.set_color(paper.grid)


def _map(
    history: SelectionHistory, values: Any, name: str, paper: Paper, *, norm: Any = None, limits: Any = None
) -> Any:
    from matplotlib.ticker import LogLocator

    figure, axes = canvas(paper, height=1.6 + 0.12 * min(len(history.blocks), 40))
    first, last = (history.steps[0], history.steps[-1]) if history.steps else (0, 1)
    axes.set_facecolor(paper.missing)
    extent = (first - 0.5, last + 0.5, -0.5, len(history.blocks) - 0.5)
    image = axes.imshow(
        values if values.size else np.full((len(history.blocks), 1), np.nan),
        aspect="auto", origin="lower", interpolation="nearest", cmap=COLOURS, extent=extent, norm=norm,
        **({} if limits is None else {"vmin": limits[0], "vmax": limits[1]}),
    )  # fmt: skip
    _name_blocks(axes, history.blocks)
    axes.set_xlabel("optimizer step")
    scale: Any = {"ticks": LogLocator(subs=(1, 2, 5)), "format": "%g"} if norm else {}
    bar = figure.colorbar(image, ax=axes, location="top", pad=0.02, aspect=50, **scale)
    bar.minorticks_off()
    ink_axes(bar.ax, paper)
    bar.set_label(name, color=paper.ink, fontsize="small")
    return figure


def _columns(matrix: np.ndarray[Any, Any]) -> list[np.ndarray[Any, Any]]:
    return np.array_split(matrix, min(COLUMNS, matrix.shape[1]), axis=1)


def _name_blocks(axes: Axes, blocks: Sequence[str]) -> None:
    every = -(-len(blocks) // NAMES_SHOWN)
    shown = range(0, len(blocks), every)
    axes.set_yticks(list(shown), [blocks[index].replace("layers.", "layer ") for index in shown], fontsize="x-small")
