"""What came of the runs: `runs.jsonl`, one line for each."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from agsel.errors import UserError
from tools.comparison.plan import Part, Plan, Run

Record = dict[str, Any]
"""
`cell`, `learning_rate`, `seed`; `settings` and `evaluation`, as of the plan; `error`, None unless the run failed;
`result`, what launch/train.py wrote of its cost; `file_bytes` of the trained weights; `validation` and `test`, what
launch/evaluate.py wrote.
"""


class Records:
    """The lines of the file, by run.

    Args:
        path: of the file, which is written anew, complete or not at all, with every record.

    Raises:
        UserError: the file cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._records: dict[Run, Record] = {}
        try:
            lines = path.read_text().splitlines() if path.exists() else []
            for record in map(json.loads, lines):
                self._records[Run(record["cell"], record["learning_rate"], record["seed"])] = record
        except (ValueError, KeyError) as error:
            raise UserError(
                f"{path} is damaged: move it away, or choose another output; runs that have ended "
                "are found in their folders"
            ) from error

    def __getitem__(self, run: Run) -> Record:
        return self._records[run]

    def __iter__(self) -> Iterator[Run]:
        return iter(self._records)

    def put(self, run: Run, record: Record) -> None:
        """Keep what came of a run, in the file too."""
        self._records[run] = record
        unfinished = self._path.with_suffix(".unfinished")
        unfinished.write_text("".join(json.dumps(record) + "\n" for record in self._records.values()))
        os.replace(unfinished, self._path)

    def has(self, run: Run, part: Part) -> bool:
        """Whether a run has been trained and measured on a part."""
        record = self._records.get(run)
        return record is not None and record["error"] is None and part in record

    def require_of(self, plan: Plan) -> None:
        """Refuse records of runs that the plan has, too, but with other settings.

        Raises:
            UserError: names the run and the settings.
        """
        for run, record in self._records.items():
            failed = record["error"] is not None and "result" not in record
            if (failed and not run.has_begun(plan.output)) or not (run.is_untrained or run.cell in plan.cells):
                continue
            new = as_read_again(new_record(plan, run))
            differing = [
                name
                for kind in ("settings", "evaluation")
                for name in sorted({*new[kind], *record[kind]})
                if new[kind].get(name) != record[kind].get(name)
            ]
            if differing:
                raise UserError(
                    f"{self._path} has {run} with another {', '.join(differing)}: choose another output for the "
                    "changed plan, or delete the folder of that cell and its lines there"
                )


def new_record(plan: Plan, run: Run) -> Record:
    """Of a run of which nothing is known yet."""
    identity = {"cell": run.cell, "learning_rate": run.learning_rate, "seed": run.seed}
    parts: list[Part] = ["validation", "test"] if plan.validation else ["test"]
    evaluation = {part: plan.evaluation_of(run, part) for part in parts}
    return {**identity, "settings": plan.settings_of(run), "evaluation": evaluation, "error": None}


def as_read_again(record: Record) -> Record:
    """As JSON gives it back, with dates as text and tuples as lists."""
    return json.loads(json.dumps(record, default=str))
