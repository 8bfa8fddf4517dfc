"""How methods scale over GPUs: table and picture from rows of tools/bench.py that differ in their number of ranks.

python tools/bench.py --plan tools/bench_scaling.yaml --output runs/scaling
python tools/bench_scaling.py runs/scaling     # writes scaling.md and scaling.png there

Weak scaling keeps the micro-batch of each GPU, strong scaling the rows of all GPUs together. Efficiency is tokens per
second and GPU against those of the fewest GPUs measured. Moving: how much longer a step takes than one whose optimizer
states all stay on the GPU (`--offload_states off`), be it the GPU or the host that waits for the copies.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from bench import Configuration, configuration_of, gigabytes, measured_rows, origins

COLUMNS = (
    *("model", "ZeRO", "method", "GPUs", "ms/step (10-90 %)", "tokens/s/GPU", "peak GB", "moved GB", "moving"),
    *("efficiency", "minus full's"),
)
SUMMARY = ("model", "ZeRO", "method", "ms/step", "peak GB", "moving", "weak", "weak, gradients", "strong")
FULL = "full"
MARKERS = {1: "o", 2: "s", 3: "^"}
IDEAL = "ideal: in proportion\nto the GPUs"


@dataclass(frozen=True)
class Series:
    """Rows of one configuration on growing numbers of GPUs.

    Attributes:
        configuration: of the row with the fewest.
        rows: by number of GPUs, in rising order.
    """

    configuration: Configuration
    rows: dict[int, dict[str, Any]]

    def efficiency(self, ranks: int) -> float:
        """Tokens per second and GPU on so many GPUs, as a share of those on the fewest."""
        alone = next(iter(self.rows.values()))
        return float(self.rows[ranks]["tokens_per_second"] / alone["tokens_per_second"])

    def efficiency_of_gradients(self, ranks: int) -> float | None:
        """The same of forward and backward alone, for equal rows per GPU; None where phases are not told apart.

        The optimizer step does not get the same work on more GPUs, because ZeRO divides it among them.
        """
        alone, together = (
            [row["forward_ms"], row["backward_ms"]] for row in (next(iter(self.rows.values())), self.rows[ranks])
        )
        return None if None in alone + together else float(sum(alone) / sum(together))


def main() -> None:
    """Write table and picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="--output of tools/bench.py")
    folder = parser.parse_args().folder
    try:
        rows = [row for row in measured_rows(folder) if not row["error"]]
    except (OSError, ValueError) as error:
        sys.exit(f"agsel: error: {error}")
    kinds = {"weak": weak_scaling(rows), "strong": strong_scaling(rows)}
    sections = [summary(kinds), *(section(name, series) for name, series in kinds.items()), origins(rows)]
    text = "\n".join(line for lines in sections for line in lines)
    (folder / "scaling.md").write_text(text + "\n")
    print(text)
    draw(kinds, folder / "scaling.png")


def weak_scaling(rows: Iterable[dict[str, Any]]) -> list[Series]:
    """Series with equal rows per GPU."""
    return _series(rows, lambda configuration: replace(configuration, ranks=1))


def strong_scaling(rows: Iterable[dict[str, Any]]) -> list[Series]:
    """Series with equal rows on all GPUs together."""
    return _series(rows, lambda one: replace(one, ranks=1, micro_batch=one.micro_batch * one.ranks))


def _series(rows: Iterable[dict[str, Any]], shared: Any) -> list[Series]:
    found: dict[Configuration, dict[int, dict[str, Any]]] = {}
    for row in sorted(rows, key=lambda row: row["ranks"]):
        found.setdefault(shared(configuration_of(row)), {})[row["ranks"]] = row
    series = [Series(configuration_of(next(iter(members.values()))), members) for members in found.values()]
    return sorted((one for one in series if len(one.rows) > 1), key=_place)


def _place(series: Series) -> tuple[Any, ...]:
    """The larger of two models comes later, then higher stages, then agsel."""
    one = series.configuration
    return next(iter(series.rows.values()))["flops_per_token"], one.stage, one.method != FULL, one.method


def summary(kinds: dict[str, list[Series]]) -> list[str]:
    """One line for each series of weak scaling, in Markdown: what it takes on each number of GPUs, and efficiencies.

    Efficiencies are those of all numbers of GPUs but the smallest; `gradients` leaves the optimizer step out.
    """
    counts = sorted({ranks for one in kinds["weak"] for ranks in one.rows})
    strong = {_without_size(one): one for one in kinds["strong"]}

    def on(wanted: Sequence[int], series: Series | None, show: Any) -> str:
        return " / ".join("-" if series is None or n not in series.rows else show(series, n) for n in wanted)

    all_counts, more_than_fewest = (" / ".join(map(str, some)) for some in (counts, counts[1:]))
    head = [
        f"GPUs: {all_counts}; weak and strong efficiency: {more_than_fewest}",
        "",
        "| " + " | ".join(SUMMARY) + " |",
        "|---|---:|---" + "|---:" * (len(SUMMARY) - 3) + "|",
    ]
    lines = []
    for one in kinds["weak"]:
        cells = [
            one.configuration.model,
            str(one.configuration.stage),
            one.configuration.label,
            on(counts, one, lambda series, n: f"{series.rows[n]['ms_per_step']:.0f}"),
            on(counts, one, lambda series, n: f"{series.rows[n]['peak_bytes'] / 1e9:.1f}"),
            on(counts, one, lambda series, n: _moving(series, n, kinds["weak"])),
            on(counts[1:], one, lambda series, n: f"{series.efficiency(n):.0%}"),
            on(counts[1:], one, lambda series, n: _percent(series.efficiency_of_gradients(n))),
            on(counts[1:], strong.get(_without_size(one)), lambda series, n: f"{series.efficiency(n):.0%}"),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return [*head, *lines, ""] if lines else []


def _without_size(series: Series) -> Configuration:
    """What series of weak and strong scaling share."""
    return replace(series.configuration, micro_batch=1, ranks=1)


def _moving(series: Series, ranks: int, others: Iterable[Series]) -> str:
    beside = _series_of(replace(series.configuration, offload_states=False), others)
    if beside is None or beside is series or ranks not in beside.rows:
        return "-"
    return f"{series.rows[ranks]['ms_per_step'] / beside.rows[ranks]['ms_per_step'] - 1:+.0%}"


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.0%}"


def section(name: str, series: Sequence[Series]) -> list[str]:
    """A title and one line for each row of the series, in Markdown; nothing without series."""
    if not series:
        return []
    where = "per GPU" if name == "weak" else "on all GPUs together"
    title = f"**{name} scaling, {_rows(name, series[0])} x {series[0].configuration.sequence} tokens {where}**"
    head = ["| " + " | ".join(COLUMNS) + " |", "|---|---:|---" + "|---:" * (len(COLUMNS) - 3) + "|"]
    lines = [f"| {' | '.join(_cells(member, ranks, series))} |" for member in series for ranks in member.rows]
    return [title, "", *head, *lines, ""]


def _rows(name: str, series: Series) -> int:
    """Rows that stay the same while GPUs are added: of each in weak scaling, of all in strong scaling."""
    one = series.configuration
    return one.micro_batch if name == "weak" else one.micro_batch * one.ranks


def _title(name: str, series: Iterable[Series]) -> str:
    """`weak: 8 rows per GPU`; the rows are left out where series differ in them."""
    counts = {_rows(name, one) for one in series}
    rows = f"{min(counts)} rows" if len(counts) == 1 else "equal rows"
    return f"{name}: {rows} {'per GPU' if name == 'weak' else 'in all'}"


def _cells(series: Series, ranks: int, others: Sequence[Series]) -> list[str]:
    configuration, row = series.configuration, series.rows[ranks]
    efficiency = series.efficiency(ranks)
    full = full_beside(series, others)
    behind = full is not None and full is not series and ranks in full.rows
    return [
        configuration.model,
        str(configuration.stage),
        configuration.label,
        str(ranks),
        f"{row['ms_per_step']:.1f} ({row['ms_p10']:.0f}-{row['ms_p90']:.0f})",
        f"{row['tokens_per_second']:.0f}",
        gigabytes(row["peak_bytes"]),
        f"{row['moved_bytes_per_step'] / 1e9:.2f}",
        _moving(series, ranks, others),
        f"{efficiency:.1%}",
        f"{100 * (efficiency - full.efficiency(ranks)):+.1f}" if behind and full else "-",
    ]


def full_beside(series: Series, others: Iterable[Series]) -> Series | None:
    """The series of full fine-tuning with the same model, stage, shape and kernels."""
    return _series_of(replace(series.configuration, method=FULL).canonical(), others)


def _series_of(configuration: Configuration, series: Iterable[Series]) -> Series | None:
    return next((one for one in series if one.configuration == configuration), None)


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
        for axis, model in zip(axes, models, strict=True):
            _draw_model(axis, [one for one in series if one.configuration.model == model])
            axis.set_title(model, fontsize="small", loc="left")
        axes[0].set_ylabel(f"{_title(name, series)}\n1000 tokens/s, all GPUs")
    for axis in grid[-1]:
        axis.set_xlabel("GPUs")
    lines = {line.get_label(): line for axes in grid for axis in axes for line in axis.lines}
    named = {label: line for label, line in lines.items() if not label.startswith("_")}
    named |= {IDEAL: named.pop(IDEAL)}
    figure.legend(named.values(), named.keys(), loc="outside right center", frameon=False)
    figure.savefig(path, dpi=150)


def _draw_model(axis: Any, series: Sequence[Series]) -> None:
    for one in series:
        configuration = one.configuration
        line = "--" if configuration.method == FULL else "-" if configuration.offload_states else ":"
        style = {"linestyle": line, "color": f"C{configuration.stage - 1}"}
        marker = {"marker": MARKERS[configuration.stage], "markerfacecolor": "none", "markersize": 6}
        speeds = [ranks * row["tokens_per_second"] / 1000 for ranks, row in one.rows.items()]
        axis.axline((0, 0), (min(one.rows), speeds[0]), color="0.75", linewidth=0.7, zorder=1, label=IDEAL)
        axis.plot(list(one.rows), speeds, label=f"ZeRO-{configuration.stage} {configuration.label}", **style, **marker)
    counts = sorted({ranks for one in series for ranks in one.rows})
    axis.set_xticks(counts)
    axis.set_xlim(0, 1.05 * counts[-1])
    axis.set_ylim(bottom=0, auto=True)
    axis.grid(alpha=0.3)
    axis.spines[["top", "right"]].set_visible(False)


if __name__ == "__main__":
    main()
