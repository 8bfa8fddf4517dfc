"""A comparison: which cells, learning rates and seeds, and on which rows they are judged."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from itertools import zip_longest
from pathlib import Path
from typing import Any, Literal

from agsel.data.fields import TEMPLATES, Fields, escape

Part = Literal["validation", "test", "other"]
PARTS: tuple[Part, ...] = ("validation", "test", "other")
BEFORE = "before"
"""The name of the model that all cells start from, in tables and files."""


@dataclass(frozen=True)
class Cell:
    """One way to train.

    Attributes:
        settings: flags of launch/train.py that it has beside those of all cells.
        learning_rates: to choose from.
    """

    name: str
    settings: dict[str, Any]
    learning_rates: tuple[float, ...]


@dataclass(frozen=True)
class Run:
    """A cell with one learning rate and one seed; `BEFORE` is the model that has not been trained.

    Attributes:
        cell: name of the cell.
    """

    cell: str
    learning_rate: float = 0.0
    seed: int = 0

    def __str__(self) -> str:
        return self.cell if self.is_untrained else f"{self.cell} {self.learning_rate:g} seed {self.seed}"

    @property
    def is_untrained(self) -> bool:
        """Whether there is nothing to train."""
        return self.cell == BEFORE

    def folder(self, output: Path) -> Path:
        """What launch/train.py and launch/evaluate.py write is there."""
        place = output / self.cell
        return place if self.is_untrained else place / f"{self.learning_rate:g}" / f"seed-{self.seed}"


@dataclass(frozen=True)
class Plan:
    """A comparison.

    Attributes:
        output: folder for everything.
        shared: flags of launch/train.py of all cells: the recipe and what the plan sets over it.
        cells: by name.
        seeds: of the runs; learning rates are tried with the first.
        test: flags of launch/evaluate.py that name the rows of the test part.
        validation: the same for the rows that a learning rate is chosen on.
        evaluate: flags of launch/evaluate.py for all parts.
        other: the same for rows of another task, that of which a run has forgotten something.
        forgetting: a plain text file; how much less likely it becomes is what a run has forgotten.
        results: file of what came of the runs, of any folder and machine; left out, `runs.jsonl` in `output`.
        gpus_per_run: GPUs of each run, or processes on a machine without.
        runs_per_gpu: runs that may share a GPU, or the machine without.
        compare_with: cells that the others are compared with, row by row.
        of_base: the cells of another plan, which this one goes on from: they may have had other numbers of tries.
        words: further words of the command line of launch/train.py.
    """

    output: Path
    shared: dict[str, Any]
    cells: dict[str, Cell]
    seeds: tuple[int, ...]
    test: dict[str, Any]
    validation: dict[str, Any] = field(default_factory=dict)
    evaluate: dict[str, Any] = field(default_factory=dict)
    other: dict[str, Any] = field(default_factory=dict)
    forgetting: str | None = None
    results: Path | None = None
    gpus_per_run: int = 1
    runs_per_gpu: int = 1
    compare_with: tuple[str, ...] = ()
    of_base: frozenset[str] = frozenset()
    words: tuple[str, ...] = ()

    @property
    def records(self) -> Path:
        """The file of what came of the runs."""
        return self.results or self.output / "runs.jsonl"

    @property
    def parts(self) -> list[Part]:
        """What runs are measured on."""
        return [part for part in PARTS if getattr(self, part)]

    @property
    def chooses_rates(self) -> bool:
        """Whether cells have several learning rates."""
        return any(len(cell.learning_rates) > 1 for cell in self.cells.values())

    def settings_of(self, run: Run) -> dict[str, Any]:
        """Flags of launch/train.py as the plan gives them."""
        if run.is_untrained:
            return self.shared
        own = {"learning_rate": run.learning_rate, "seed": run.seed}
        return {**self.shared, **self.cells[run.cell].settings, **own}

    def evaluation_of(self, run: Run, part: Part) -> dict[str, Any]:
        """Flags of launch/evaluate.py for a part, the columns of the run's data among them.

        A learning rate is chosen by the likelihood of the answers, so nothing is generated for that.
        """
        settings = self.settings_of(run)
        names = [column.name for column in fields(Fields)]
        columns = {name: settings[name] for name in names if settings.get(name) is not None}
        if part == "validation":
            return {**columns, **self.evaluate, **self.validation, "skip_generation": True}
        if part == "other":
            return {**columns, **self.evaluate, **self.other}
        forgetting = {"perplexity": self.forgetting} if self.forgetting else {}
        return {**columns, **self.evaluate, **self.test, **forgetting}

    def tries(self, cell: str) -> list[Run]:
        """Every learning rate of a cell, with the first seed."""
        return [Run(cell, rate, self.seeds[0]) for rate in self.cells[cell].learning_rates]

    def tuning_runs(self) -> list[Run]:
        """Every learning rate of every cell, with the first seed: first rates of all cells, then second ones."""
        tries = zip_longest(*map(self.tries, self.cells))
        return [run for of_cells in tries for run in of_cells if run is not None]

    def all_runs(self) -> list[Run]:
        """Every seed of every cell at every learning rate that might be chosen."""
        cells = self.cells.values()
        return [Run(cell.name, rate, seed) for cell in cells for rate in cell.learning_rates for seed in self.seeds]

    def final_runs(self, chosen: Mapping[str, float]) -> list[Run]:
        """Every seed of every cell at its chosen learning rate, one seed of all cells after the other."""
        return [Run(cell, rate, seed) for seed in self.seeds for cell, rate in chosen.items()]


def words_of(settings: Mapping[str, Any]) -> Iterator[str]:
    """The words of a command line."""
    for name, value in settings.items():
        yield f"--{name}"
        words = map(_word, value if isinstance(value, list) else [value])
        yield from map(escape, words) if name in TEMPLATES else words


def _word(value: Any) -> str:
    return json.dumps(value) if isinstance(value, bool | dict) else str(value)
