"""What was learnt and what it cost, one line a cell: in Markdown and as CSV, in the columns of PEFT's comparison."""

from __future__ import annotations

import csv
import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from tools.comparison.chosen_rates import validation_nll
from tools.comparison.differences import Interval, Judged, accuracy_difference, mean_over_seeds, nll_difference
from tools.comparison.plan import BEFORE, Part, Plan, Run
from tools.comparison.records import Record, Records

NOTES = (
    "NLL: nats per token of the right answers. Mean ± standard deviation over the seeds. Differences: percentile "
    "bootstrap over the rows of the test part, seeds averaged, 95 %. Train time: from the first step to the last, "
    "without start and export; step: the median. Peak: memory that PyTorch kept on the fullest GPU. File: trained "
    "weights. Forgetting: rise of the NLL of other text. Other task: NLL of its answers; forget ratio: by what "
    "share its exact matches have become fewer; collapsed: the share of seeds with less than 1 % of them, as GaLLoP's "
    "authors count. A row with fewer than three seeds decides nothing."
)


@dataclass(frozen=True)
class Row:
    """A cell at the learning rate that was chosen for it.

    Attributes:
        records: of its seeds that have been measured, those before.
        errors: of its other runs, with their names.
        judged: what the seeds did on each row of the test part, by seed.
        before: what the model did before training, if that is known.
        seeds: how many the plan has.
        compared: differences of NLL and exact match to other cells, by their names.
    """

    name: str
    learning_rate: float | None
    records: Sequence[Record] = ()
    errors: Sequence[str] = ()
    judged: Mapping[int, Judged] = field(default_factory=dict)
    before: Record | None = None
    seeds: int = 1
    compared: Mapping[str, tuple[Interval | None, Interval | None]] = field(default_factory=dict)

    def tested(self, name: str, part: Part = "test") -> list[float]:
        """A result of a part, of every seed that has it."""
        found = [record.get(part, {}).get(name) for record in self.records]
        return [value for value in found if value is not None]

    def cost(self, name: str) -> float | None:
        """A mean over the seeds of what launch/train.py wrote."""
        values = [record["result"][name] for record in self.records if (record.get("result") or {}).get(name)]
        return statistics.fmean(values) if values else None

    @property
    def train_seconds(self) -> float | None:
        """Mean over the seeds; of a run that was resumed, for all of its steps at the pace of those that were timed."""
        results = [record["result"] for record in self.records if (record.get("result") or {}).get("train_seconds")]
        seconds = [result["train_seconds"] * result["steps"] / result["timed_steps"] for result in results]
        return statistics.fmean(seconds) if seconds else None

    @property
    def file_bytes(self) -> float | None:
        """Of the trained weights."""
        return next((record["file_bytes"] for record in self.records if "file_bytes" in record), None)

    @property
    def forgetting(self) -> list[float]:
        """By how much the NLL of other text has risen, in nats per token, of every seed."""
        before = self.before["test"].get("text_nll") if self.before else None
        return [nll - before for nll in self.tested("text_nll")] if before is not None else []

    @property
    def forget_ratios(self) -> list[float]:
        """GaLLoP's, of the other task: max(0, (accuracy before - accuracy) / accuracy before), of every seed."""
        before = self.before.get("other", {}).get("accuracy") if self.before else None
        return [max(0.0, (before - share) / before) for share in self.tested("accuracy", "other")] if before else []

    @property
    def collapse_rate(self) -> float | None:
        """GaLLoP's, of the other task: the share of the seeds whose accuracy there is 0 in whole per cent."""
        shares = self.tested("accuracy", "other")
        return statistics.fmean(math.floor(100 * share) == 0 for share in shares) if shares else None


def collect(plan: Plan, records: Records, chosen: Mapping[str, float]) -> list[Row]:
    """A row for the model before training and for every cell, in the order of the plan."""
    base = _row(records, BEFORE, None, [Run(BEFORE)], None)
    before = base.records[0] if base.records else None
    rows = []
    for cell in plan.cells.values():
        rate = chosen.get(cell.name)
        if rate is None:
            rows.append(Row(cell.name, None, errors=_errors(records, plan.tries(cell.name)), seeds=len(plan.seeds)))
        else:
            runs = [Run(cell.name, rate, seed) for seed in plan.seeds]
            rows.append(_row(records, cell.name, rate, runs, before))
    references = {row.name: row for row in rows if row.name in plan.compare_with}
    return [
        replace(row, compared={name: compare(row, references[name]) for name in plan.compare_with})
        for row in [base, *rows]
    ]


def _row(records: Records, name: str, rate: float | None, runs: Sequence[Run], before: Record | None) -> Row:
    done = [run for run in runs if records.has(run, "test")]
    judged = {run.seed: records.judged(run) for run in done}
    return Row(name, rate, [records[run] for run in done], _errors(records, runs), judged, before, len(runs))


def _errors(records: Records, runs: Sequence[Run]) -> list[str]:
    return [f"{run}: {records[run]['error']}" for run in runs if run in records and records[run]["error"]]


def markdown(plan: Plan, records: Records, rows: Sequence[Row]) -> str:
    """All tables."""
    optional = {name: column for name, column in OPTIONAL.items() if any(column(row) != "-" for row in rows)}
    parts = [_table(COLUMNS | optional, rows), *_differences(plan, rows), *_tries(plan, records)]
    return "\n\n".join([*parts, NOTES])


def write_csv(rows: Sequence[Row], path: Path) -> None:
    """One line a cell, plain numbers in nats, seconds, bytes; differences with their intervals."""
    lines = [{**_plain(row), **_plain_differences(row)} for row in rows]
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(name for line in lines for name in line)))
        writer.writeheader()
        writer.writerows(lines)


def _plain(row: Row) -> dict[str, Any]:
    measured = {
        "nll": row.tested("nll"),
        "accuracy": row.tested("accuracy"),
        "forgetting": row.forgetting,
        "other_nll": row.tested("nll", "other"),
        "other_accuracy": row.tested("accuracy", "other"),
        "forget_ratio": row.forget_ratios,
    }
    numbers = {f"{name}{suffix}": value for name, values in measured.items() for suffix, value in _moments(values)}
    costs = {name: row.cost(name) for name in ("step_seconds", "peak_bytes", "peak_reserved_bytes")}
    return {
        "cell": row.name,
        "learning_rate": row.learning_rate,
        "seeds": len(row.records),
        **numbers,
        "collapse_rate": row.collapse_rate,
        "train_seconds": row.train_seconds,
        **costs,
        "trainable_parameters": row.cost("trainable_parameters"),
        "parameters": row.cost("parameters"),
        "file_bytes": row.file_bytes,
        "error": "; ".join(row.errors),
    }


def _moments(values: Sequence[float]) -> list[tuple[str, float | None]]:
    return [("", statistics.fmean(values) if values else None), ("_deviation", _deviation(values))]


def _deviation(values: Sequence[float]) -> float | None:
    if len(values) < 2:
        return None
    return statistics.stdev(values) if all(map(math.isfinite, values)) else math.nan


def _spread(values: Sequence[float], form: str) -> str:
    """Mean ± standard deviation."""
    if not values:
        return "-"
    deviation = _deviation(values)
    spread = "" if deviation is None else f" ± {deviation:{form.removeprefix('+')}}"
    return f"{statistics.fmean(values):{form}}{spread}"


def _percent(shares: Sequence[float]) -> str:
    return _spread([100 * share for share in shares], ".1f")


def _seeds(row: Row) -> str:
    """How many there are, of how many if some are missing, and what became of the others."""
    failed = f"failed: {'; '.join(row.errors)}" if row.errors else ""
    done = len(row.records)
    said = str(done) if done == row.seeds else f"{done} of {row.seeds}" if done or not failed else ""
    return ", ".join(filter(None, [said, failed]))


def _number(value: float | None, form: str, unit: float = 1) -> str:
    return "-" if value is None else f"{value / unit:{form}}"


COLUMNS: dict[str, Callable[[Row], str]] = {
    "cell": lambda row: row.name,
    "learning rate": lambda row: _number(row.learning_rate, "g"),
    "seeds": _seeds,
    "NLL": lambda row: _spread(row.tested("nll"), ".4f"),
    "exact match %": lambda row: _percent(row.tested("accuracy")),
    "train time s": lambda row: _number(row.train_seconds, ".0f"),
    "step ms": lambda row: _number(row.cost("step_seconds"), ".0f", 1e-3),
    "peak GB": lambda row: _number(row.cost("peak_reserved_bytes"), ".1f", 1e9),
    "trainable parameters": lambda row: _number(row.cost("trainable_parameters"), ",.0f"),
    "file MB": lambda row: _number(row.file_bytes, ".1f", 1e6),
}
OPTIONAL: dict[str, Callable[[Row], str]] = {
    "forgetting": lambda row: _spread(row.forgetting, "+.3f"),
    "other task NLL": lambda row: _spread(row.tested("nll", "other"), ".3f"),
    "other task %": lambda row: _percent(row.tested("accuracy", "other")),
    "forget ratio %": lambda row: _percent(row.forget_ratios),
    "collapsed %": lambda row: _number(row.collapse_rate, ".0f", 0.01),
}
"""Of what only some plans measure."""


def _table(columns: Mapping[str, Callable[[Row], str]], rows: Iterable[Row]) -> str:
    cells = [[column(row).replace("|", "/") for column in columns.values()] for row in rows]
    return _lines([list(columns), ["---"] + ["---:"] * (len(columns) - 1), *cells])


def _lines(rows: Iterable[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _differences(plan: Plan, rows: Sequence[Row]) -> list[str]:
    """A table of the differences to every cell of `compare_with`."""
    if not plan.compare_with:
        return []
    names = [f"{what} - {name}" for name in plan.compare_with for what in ("NLL", "exact match, points")]
    lines = []
    for row in rows:
        texts = [
            text
            for nll, share in row.compared.values()
            for text in (_interval(nll, ".4f"), _interval(share, ".1f", 100))
        ]
        lines.append([row.name, *texts])
    return [_lines([["cell", *names], ["---"] + ["---:"] * len(names), *lines])]


def _plain_differences(row: Row) -> dict[str, float]:
    found: dict[str, float] = {}
    for reference, intervals in row.compared.items():
        for what, interval in zip(("nll", "accuracy"), intervals, strict=True):
            for name, value in (interval._asdict() if interval else {}).items():
                found[f"{what} - {reference}: {name}"] = value
    return found


def compare(row: Row, reference: Row) -> tuple[Interval | None, Interval | None]:
    """Differences of NLL and exact match over the seeds that both have; None where there is nothing to compare.

    The model before training is the same for all seeds.
    """
    if row.name == reference.name or not row.judged or not reference.judged:
        return None, None
    if row.name == BEFORE:
        sides = [*row.judged.values()], [*reference.judged.values()]
    else:
        seeds = [seed for seed in row.judged if seed in reference.judged]
        sides = [row.judged[seed] for seed in seeds], [reference.judged[seed] for seed in seeds]
        if not seeds:
            return None, None
    one, other = map(mean_over_seeds, sides)
    return nll_difference(one, other), accuracy_difference(one, other)


def _interval(interval: Interval | None, form: str, unit: float = 1) -> str:
    if interval is None:
        return "-"
    difference, low, high = (f"{value * unit:+{form}}" for value in interval)
    return f"{difference} [{low}, {high}]"


def _tries(plan: Plan, records: Records) -> list[str]:
    """The NLL of the validation part at every learning rate, if there was a choice."""
    if not plan.chooses_rates:
        return []
    lines = [["cell", "learning rate: NLL of the validation part"], ["---", "---"]]
    for cell in plan.cells.values():
        runs = sorted(plan.tries(cell.name), key=lambda run: run.learning_rate)
        tries = [f"{run.learning_rate:g}: {_nll_of_try(records, run)}" for run in runs if run in records]
        lines.append([cell.name, ", ".join(tries)])
    return [_lines(lines)]


def _nll_of_try(records: Records, run: Run) -> str:
    if records[run]["error"]:
        return "failed"
    nll = validation_nll(records, run)
    return f"{nll:.4f}" if math.isfinite(nll) else "no number"
