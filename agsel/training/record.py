"""The files in which a run says what it has done: `metrics.jsonl`, `selection.jsonl` and `starts.jsonl`."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path

from agsel.monitor import METRICS, SELECTION, STARTS, SelectionHistory, StepLines
from agsel.monitor.history import read_lines


class Record:
    """Written by the first rank.

    Args:
        folder: of the run.
        checkpoint: from which the run goes on; what the run that wrote it has recorded until then is taken over.
    """

    def __init__(self, folder: Path, checkpoint: Path | None) -> None:
        self._folder = folder
        self._origin = checkpoint and checkpoint.parent

    def begin(self, blocks: Sequence[str], step: int) -> SelectionHistory:
        """Open the files after so many steps. Returns the history of these steps, as far as it is known."""
        self._note_start(step)
        self._metrics, self._selection = self._open(METRICS, step), self._open(SELECTION, step)
        logged, selected = read_lines(self._folder / METRICS), read_lines(self._folder / SELECTION)
        self._began = time.perf_counter() - max((line.get("seconds", 0) for line in (*logged, *selected)), default=0)
        self._first_step = step
        self._evaluated = {name for line in logged if line["step"] == step for name in line if name.startswith("eval_")}
        if selected:
            return SelectionHistory.read(self._folder / SELECTION)
        history = SelectionHistory(tuple(blocks))
        self._selection.append(history.heading)
        return history

    def step(self, history: SelectionHistory) -> None:
        """Write the last step of the history, and the seconds of training until its end."""
        self._selection.append(history.last_line | {"seconds": self._seconds()})

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        """Write numbers of a step, with the seconds that the run has trained until now, without interruptions.

        With `--eval_on_start` a run that goes on evaluates what it may have evaluated before: that is there already.
        """
        if step > self._first_step or not self._evaluated & numbers.keys():
            self._metrics.append({"step": step, "seconds": self._seconds(), **numbers})

    def synchronise(self) -> None:
        """What is written outlives the host, as the checkpoint does that is saved now."""
        for lines in (self._metrics, self._selection):
            lines.synchronise()

    def end(self) -> None:
        """Close the files."""
        for lines in (self._metrics, self._selection):
            lines.close()

    def _seconds(self) -> float:
        return round(time.perf_counter() - self._began, 3)

    def _note_start(self, step: int) -> None:
        """When, and after which step; and how far the process before had come, whose later steps are done again."""
        selection = self._folder / SELECTION
        known = read_lines(selection)
        reached = {"reached": known[-1]["step"], "stopped": _moment(selection.stat().st_mtime)} if known else {}
        starts = StepLines(self._folder / STARTS, sys.maxsize)
        starts.append({"step": step, "time": _moment(time.time())} | reached)
        starts.close()

    def _open(self, name: str, step: int) -> StepLines:
        return StepLines(self._folder / name, step, self._origin and self._origin / name)


def _moment(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds")
