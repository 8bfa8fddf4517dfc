"""What a run came to, and what it cost, in numbers by which runs are compared."""

from __future__ import annotations

import re
import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from agsel.report import wording
from agsel.report.run_files import Run


@dataclass(frozen=True)
class FinalNumber:
    """One of them.

    Attributes:
        title: what it is.
        of: reads it from a run, None where it is not known.
        shown: writes it with its unit.
        apart: writes how far two are apart; by default as `shown`, and relative to one of them.
    """

    title: str
    of: Callable[[Run], float | None]
    shown: Callable[[float], str] = wording.number
    apart: Callable[[float], str] | None = None

    def difference(self, value: float, base: float) -> str:
        """From a base: `+0.031 (+2.1 %)`, or `equal`."""
        if value == base:
            return "equal"
        sign = "+" if value > base else wording.MINUS
        text = sign + (self.apart or self.shown)(abs(value - base))
        return text if self.apart or not base else f"{text} ({wording.change(value, base)})"


def loss(run: Run) -> float | None:
    """Of the last logged steps."""
    return _of_result(run, "loss") or run.last("loss")


def eval_loss(run: Run) -> float | None:
    """Of the last evaluation."""
    return run.last("eval_loss")


def training_seconds(run: Run) -> float | None:
    """Of all its processes, with evaluations and checkpoints, without the time between processes."""
    return run.last("seconds") or _of_result(run, "train_seconds")


def step_milliseconds(run: Run) -> float | None:
    """Of the median step."""
    measured = _of_result(run, "step_seconds")
    return 1000 * measured if measured else _median(run, "speed/ms_per_step")


def peak_gigabytes(run: Run) -> float | None:
    """Most device memory that a process has used."""
    peak = _of_result(run, "peak_bytes")
    return peak / 1e9 if peak else max(run.values("memory/peak_gb"), default=None)


def host_gigabytes(run: Run) -> float | None:
    """Most host memory that the first process had at a logged step."""
    return max(run.values("memory/host_gb"), default=None)


def tasks_of(runs: Iterable[Run]) -> dict[str, str]:
    """Names of the accuracies of tasks in the metrics, by task."""
    names = sorted({name for run in runs for line in run.metrics for name in line})
    found = {name: re.fullmatch(r"eval_(?!mean_token_)(\w+)_accuracy", name) for name in names}
    return {match[1]: name for name, match in found.items() if match}


def final_numbers(runs: Iterable[Run]) -> list[FinalNumber]:
    """Those that any of the runs can have."""
    return [
        FinalNumber("Steps", lambda run: run.steps),
        FinalNumber("Loss, last", loss),
        FinalNumber("Evaluation loss, last", eval_loss),
        *(_accuracy(task, name) for task, name in tasks_of(runs).items()),
        FinalNumber("Training time", training_seconds, wording.seconds),
        FinalNumber("Median step", step_milliseconds, wording.milliseconds),
        FinalNumber("Tokens per second, median", lambda run: _median(run, "speed/tokens_per_second")),
        FinalNumber("Peak device memory", peak_gigabytes, wording.gigabytes),
        FinalNumber("Host memory, first rank", host_gigabytes, wording.gigabytes),
        FinalNumber("Trainable parameters", lambda run: run.result.get("trainable_parameters")),
    ]


def _of_result(run: Run, name: str) -> float | None:
    """Nothing of a run that has gone on since."""
    return run.result.get(name) if run.is_finished else None


def _accuracy(task: str, name: str) -> FinalNumber:
    return FinalNumber(f"Accuracy on {task}, last", lambda run: run.last(name), wording.share, wording.points)


def _median(run: Run, name: str) -> float | None:
    values = run.values(name)
    return statistics.median(values) if values else None
