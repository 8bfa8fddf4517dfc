"""What came of the runs, one line for each: all that tables and pictures are made of, without the runs' folders."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from agsel.errors import UserError
from agsel.replacing import replace_file
from tools.comparison.differences import Judged
from tools.comparison.plan import Part, Plan, Run

Record = dict[str, Any]
"""
`cell`, `learning_rate`, `seed`; `settings` and `evaluation`, as of the plan; `contents`, digests of the files that
these name; `environment`, where it was; `error`, None unless the run failed; `seconds` that all of it took; `result`,
what launch/train.py wrote of its cost; `file_bytes` of the trained weights; `validation`, `test` and `other`, what
launch/evaluate.py wrote; `judged`, what it did on each row of the test part: `nll`, `right` as 1 and 0, and
`questions`, by which another line of the file has the `rows` and `tokens` that all runs have in common.
"""
MODEL = "model_name_or_path"
DECIMALS = 4
"""Of the likelihood of a row, in nats per token: that of all rows is as sure as the third, at best."""


class Records:
    """The lines of the file, by run. Files may be joined: of several lines of a run, what succeeded last counts.

    Args:
        path: of the file, which is written anew, complete or not at all, with every record.

    Raises:
        UserError: the file cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._records: dict[Run, Record] = {}
        self._questions: dict[str, dict[str, list[int]]] = {}
        self._read()

    def _read(self) -> None:
        try:
            lines = self._path.read_text(encoding="utf-8").splitlines() if self._path.exists() else []
            for line in map(json.loads, lines):
                self._take(line)
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{self._path} is damaged: bring back an earlier state of it, or move it away; runs that have ended "
                "are found in their folders"
            ) from error

    def _take(self, line: dict[str, Any]) -> None:
        if "rows" in line:
            self._questions[line["questions"]] = {name: line[name] for name in ("rows", "tokens")}
            return
        run = Run(line["cell"], line["learning_rate"], line["seed"])
        if not (isinstance(line["settings"], dict) and isinstance(line["evaluation"], dict)):
            raise TypeError(f"{run} has no settings")
        before = self._records.get(run, {})
        if not (line["error"] and before.get("error", "never") is None):
            self._records[run] = {**before, **line}

    def __getitem__(self, run: Run) -> Record:
        return self._records[run]

    def __iter__(self) -> Iterator[Run]:
        return iter(self._records)

    def get(self, run: Run) -> Record | None:
        """What is known of a run, if anything."""
        return self._records.get(run)

    def put(self, run: Run, record: Record) -> None:
        """Keep what came of a run, in the file too, with what another comparison has written there since.

        Args:
            run: that has ended.
            record: of it; `judged` is taken apart, if it is not yet.
        """
        judged = record.get("judged")
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with _locked(self._path.parent):
            self._read()
            if isinstance(judged, Judged):
                record = {**record, "judged": self._compact(judged)}
            self._records[run] = record
            lines = [{"questions": name, **common} for name, common in self._questions.items()]
            texts = [json.dumps(line, separators=(",", ":"), default=str) for line in (*lines, *self._records.values())]
            replace_file(self._path, "".join(f"{text}\n" for text in texts))

    def _compact(self, judged: Judged) -> dict[str, Any]:
        common = {"rows": judged.rows, "tokens": judged.tokens.astype(int).tolist()}
        name = hashlib.sha256(json.dumps(common).encode()).hexdigest()[:12]
        self._questions[name] = common
        right = None if judged.correct is None else "".join(str(int(row)) for row in judged.correct)
        return {"questions": name, "nll": judged.nll.round(DECIMALS).tolist(), "right": right}

    def judged(self, run: Run) -> Judged:
        """What a run did on each row of the test part.

        Raises:
            UserError: the file does not say it.
        """
        compact = self._records[run].get("judged")
        common = self._questions.get(compact["questions"]) if compact else None
        if compact is None or common is None:
            raise UserError(f"{self._path} does not say what {run} did on each row: delete its line to train it again")
        right = None if compact["right"] is None else np.array([*map(float, compact["right"])])
        return Judged(common["rows"], np.array(common["tokens"], float), np.array(compact["nll"], float), right)

    def has(self, run: Run, part: Part) -> bool:
        """Whether a run has been trained and measured on a part."""
        record = self._records.get(run)
        return record is not None and record["error"] is None and part in record

    def require_of(self, plan: Plan, contents: Mapping[str, str]) -> None:
        """Refuse records of runs that the plan has, too, but with other settings or other data.

        Args:
            plan: of the comparison.
            contents: digests of the files that it names; none, if they are not to be compared.

        Raises:
            UserError: names the run and the settings.
        """
        for run, record in self._records.items():
            if record["error"] is not None or not (run.is_untrained or run.cell in plan.cells):
                continue
            differing = differences_of(new_record(plan, run, contents), record)
            if differing:
                raise UserError(
                    f"{self._path} has {run} with another {', '.join(differing)}: choose another file (results) for "
                    "the changed plan, or delete the lines of that cell there"
                )


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Inside, no other comparison of this machine changes a file of results there."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def differences_of(new: Record, known: Record) -> list[str]:
    """What a run would be done with otherwise than it was."""
    new = json.loads(json.dumps(new, default=str))
    settings = [
        name
        for kind in ("settings", "evaluation")
        for name in sorted({*new[kind], *known[kind]})
        if new[kind].get(name) != known[kind].get(name)
    ]
    there = known.get("contents", {})
    files = [name for name, digest in new["contents"].items() if there.get(name, digest) != digest]
    return [*settings, *(f"content of {name}" for name in files)]


def new_record(plan: Plan, run: Run, contents: Mapping[str, str]) -> Record:
    """Of a run of which nothing is known yet; without training, settings of training change nothing."""
    identity = {"cell": run.cell, "learning_rate": run.learning_rate, "seed": run.seed}
    evaluation = {part: plan.evaluation_of(run, part) for part in plan.parts}
    typed = {"--": list(plan.words)} if plan.words else {}
    own = {MODEL: plan.shared.get(MODEL)} if run.is_untrained else plan.settings_of(run)
    settings = {**own, **typed}
    return {**identity, "settings": settings, "evaluation": evaluation, "contents": dict(contents), "error": None}
