"""How methods scale over GPUs, in Markdown."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from tools.bench.configurations import Configuration
from tools.bench.rows import gigabytes
from tools.bench.series import Series

COLUMNS = (
    *("model", "ZeRO", "method", "GPUs", "ms/step (10-90 %)", "tokens/s/GPU", "peak GB", "moved GB", "moving"),
    *("efficiency", "minus full's"),
)
SUMMARY = ("model", "ZeRO", "method", "ms/step", "peak GB", "moving", "weak", "weak, gradients", "strong")


def summary(kinds: dict[str, list[Series]]) -> list[str]:
    """One line for each series of weak scaling: what it takes on each number of GPUs, and efficiencies.

    Efficiencies are those of all numbers of GPUs but the smallest; `gradients` leaves the optimizer step out.
    """
    counts = sorted({ranks for one in kinds["weak"] for ranks in one.rows})
    strong = {_without_size(one): one for one in kinds["strong"]}
    all_counts, more_than_fewest = (" / ".join(map(str, some)) for some in (counts, counts[1:]))
    title = f"GPUs: {all_counts}; weak and strong efficiency: {more_than_fewest}"
    lines = [_line([*_name(one), *_over_gpus(one, counts, kinds["weak"], strong)]) for one in kinds["weak"]]
    return [title, "", *_head(SUMMARY), *lines, ""] if lines else []


def _over_gpus(
    one: Series, counts: Sequence[int], others: Sequence[Series], strong: dict[Configuration, Series]
) -> list[str]:
    return [
        _on(counts, one, lambda series, n: f"{series.rows[n]['ms_per_step']:.0f}"),
        _on(counts, one, lambda series, n: f"{series.rows[n]['peak_bytes'] / 1e9:.1f}"),
        _on(counts, one, lambda series, n: _share(series.price_of_moving(n, others), "+.0%")),
        _on(counts[1:], one, lambda series, n: _share(series.efficiency(n))),
        _on(counts[1:], one, lambda series, n: _share(series.efficiency_of_gradients(n))),
        _on(counts[1:], strong.get(_without_size(one)), lambda series, n: _share(series.efficiency(n))),
    ]


def _on(counts: Sequence[int], series: Series | None, show: Callable[[Series, int], str]) -> str:
    """What is to be shown on each number of GPUs, a dash where it was not measured."""
    return " / ".join("-" if series is None or n not in series.rows else show(series, n) for n in counts)


def _without_size(series: Series) -> Configuration:
    """What series of weak and strong scaling share."""
    return replace(series.configuration, micro_batch=1, ranks=1)


def section(name: str, series: Sequence[Series]) -> list[str]:
    """A title and one line for each row of the series; nothing without series."""
    if not series:
        return []
    where = "per GPU" if name == "weak" else "on all GPUs together"
    first = series[0]
    title = f"**{name} scaling, {first.equal_rows(name)} x {first.configuration.sequence} tokens {where}**"
    lines = [_line([*_name(one), *_cells(one, ranks, series)]) for one in series for ranks in one.rows]
    return [title, "", *_head(COLUMNS), *lines, ""]


def _cells(series: Series, ranks: int, others: Sequence[Series]) -> list[str]:
    row, ahead = series.rows[ranks], series.ahead_of_full(ranks, others)
    return [
        str(ranks),
        f"{row['ms_per_step']:.1f} ({row['ms_p10']:.0f}-{row['ms_p90']:.0f})",
        f"{row['tokens_per_second']:.0f}",
        gigabytes(row["peak_bytes"]),
        f"{row['moved_bytes_per_step'] / 1e9:.2f}",
        _share(series.price_of_moving(ranks, others), "+.0%"),
        f"{series.efficiency(ranks):.1%}",
        "-" if ahead is None else f"{100 * ahead:+.1f}",
    ]


def _name(series: Series) -> list[str]:
    one = series.configuration
    return [one.model, str(one.stage), one.label]


def _head(columns: Sequence[str]) -> list[str]:
    """Texts in the columns of model and method, numbers in the others."""
    return [_line(columns), "|---|---:|---" + "|---:" * (len(columns) - 3) + "|"]


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _share(share: float | None, form: str = ".0%") -> str:
    return "-" if share is None else format(share, form)
