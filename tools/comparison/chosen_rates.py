"""Which learning rate of a cell is the best one, by the likelihood of the answers of the validation part."""

from __future__ import annotations

import math
from collections.abc import Iterable

from tools.comparison.plan import Plan, Run
from tools.comparison.records import Record, Records


def validation_nll(records: Records, run: Run) -> float:
    """What learning rates are chosen by; of a run that failed, or whose loss is no number, infinite."""
    return _nll(records.get(run))


def _nll(record: Record | None) -> float:
    if record is None or record["error"] or "validation" not in record:
        return math.inf
    nll = record["validation"]["nll"]
    return nll if nll == nll else math.inf


def chosen_rates(plan: Plan, records: Records, cells: Iterable[str]) -> dict[str, float]:
    """By cell, of these; one of which a rate is still to be tried, or with which none went well, has none."""
    if not plan.chooses_rates:
        return {cell: plan.cells[cell].learning_rates[0] for cell in cells}
    chosen = {}
    for cell in cells:
        tries = plan.tries(cell)
        best = min(tries, key=lambda run: validation_nll(records, run))
        if all(run in records for run in tries) and math.isfinite(validation_nll(records, best)):
            chosen[cell] = best.learning_rate
    return chosen


def may_be_chosen(plan: Plan, records: Records, run: Run, record: Record) -> bool:
    """Whether no other rate of the cell is known to be better.

    Args:
        plan: of the comparison.
        records: of the other runs.
        run: that has just been measured.
        record: of it.
    """
    own = _nll(record)
    return math.isfinite(own) and all(own <= validation_nll(records, other) for other in plan.tries(run.cell))
