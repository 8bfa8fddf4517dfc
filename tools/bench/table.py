"""What was measured, in Markdown."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from tools.bench.compared_methods import METHODS, frozen_below
from tools.bench.configurations import Configuration
from tools.bench.freezing import mean_of_a_run
from tools.bench.rows import PHASES, Row, configuration_of, gigabytes, groups, origins

COLUMNS = (
    *("method", "ms/step", "10-90 %", "forward", "backward", "step", "tokens/s/GPU", "MFU"),
    *("peak GB", "steady GB", "init GB", "moved GB", "exposed ms", "time / bound", "full / time", "peak / full"),
)
NOTES = (
    "ms/step: median over the measured steps, of the slowest rank; 10-90 %: its percentiles. Memory: what PyTorch "
    "allocated (GB = 10^9 bytes), of the fullest rank. init: peak from before the model is built until training "
    "can begin. moved: optimizer states copied per step and GPU, both directions. exposed: time per step that the "
    "compute stream waited for them, without what the host waited. MFU: the arithmetic of full fine-tuning, 6 x "
    "(weights of all matrix products) + 6 x layers x heads x head size x sequence (attention, causal half) per "
    "token, per {peak_tflops:g} TFLOP/s; recomputation is not counted."
)


def table(rows: Sequence[Row], peak_tflops: float) -> str:
    """All rows in Markdown, one table per group, and what they mean."""
    lines = [line for title, members in groups(rows).items() for line in _group(title, members, peak_tflops)]
    used = {row["method"] for row in rows}
    lines += [f"- `{name}`: {method.meaning}" for name, method in METHODS.items() if name in used]
    return "\n".join([*lines, "", NOTES.format(peak_tflops=peak_tflops), "", *origins(rows)])


def _group(title: str, rows: Sequence[Row], peak_tflops: float) -> list[str]:
    head = [f"**{title}**", "", f"| {' | '.join(COLUMNS)} |", "|---" + "|---:" * (len(COLUMNS) - 1) + "|"]
    lines = [f"| {' | '.join(_cells(row, rows, peak_tflops))} |" for row in rows if not row["error"]]
    failures = [f"- {configuration_of(row).label}: {row['error']}" for row in rows if row["error"]]
    return [*head, *lines, "", *failures, *_whole_runs(rows), ""]


def _whole_runs(rows: Sequence[Row]) -> Iterator[str]:
    """What a run takes of a method whose rows are moments of it."""
    moments: dict[Configuration, dict[float, float]] = {}
    for row in rows:
        if METHODS[row["method"]].policy is frozen_below and not row["error"]:
            run = replace(configuration_of(row), fraction=Configuration.fraction)
            moments.setdefault(run, {})[row["fraction"]] = row["ms_per_step"]
    for run, times in moments.items():
        mean = mean_of_a_run(times)
        if mean is not None:
            yield f"- {run.label}, the mean of a run, interpolated between its rows: {mean:.1f} ms/step"


def _cells(row: Row, group: Sequence[Row], peak_tflops: float) -> list[str]:
    utilisation = row["tokens_per_second"] * row["flops_per_token"] / (peak_tflops * 1e12)
    return [
        configuration_of(row).label,
        f"{row['ms_per_step']:.1f}",
        f"{row['ms_p10']:.1f}-{row['ms_p90']:.1f}",
        *(f"{row[phase]:.1f}" if row[phase] is not None else "-" for phase in PHASES),
        f"{row['tokens_per_second']:.0f}",
        f"{utilisation:.1%}",
        *(gigabytes(row[name]) for name in ("peak_bytes", "steady_bytes", "initial_peak_bytes")),
        f"{row['moved_bytes_per_step'] / 1e9:.2f}",
        f"{row['exposed_ms']:.2f}" if row["exposed_ms"] is not None else "-",
        *_ratios(row, group),
    ]


def _ratios(row: Row, group: Sequence[Row]) -> list[str]:
    """The last three columns: against `bound` and against full fine-tuning."""
    time, peak = row["ms_per_step"], row["peak_bytes"]
    bound = _find(group, "bound", row["fraction"])
    full = _find(group, "full", Configuration.fraction)
    return [
        f"{time / bound['ms_per_step']:.3f}" if bound else "-",
        f"{full['ms_per_step'] / time:.2f}" if full else "-",
        f"{peak / full['peak_bytes']:.3f}" if full and full["peak_bytes"] else "-",
    ]


def _find(group: Sequence[Row], method: str, fraction: float) -> Row | None:
    found = (row for row in group if (row["method"], row["fraction"], row["error"]) == (method, fraction, None))
    return next(found, None)
