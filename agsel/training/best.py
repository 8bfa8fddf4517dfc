"""The best checkpoint of a run: whether its evaluations find the metric, and whether its weights are exported."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import Trainer

from agsel.errors import UserError, suggestion
from agsel.evaluation.tasks import read_tasks

OF_EVERY_EVALUATION = ("loss", "mean_token_accuracy", "entropy")
OF_EXPERTS = "aux_loss"
OF_TASKS = ("accuracy", "nll")
"""Of each of `--eval_tasks`, after its name."""


def require_metric(values: Mapping[str, Any]) -> None:
    """Refuse a metric that the evaluations do not find, or whose worst value would be taken for the best.

    Args:
        values: settings by name.

    Raises:
        UserError: names the metrics that there are, or what else to set.
    """
    metric = values.get("metric_for_best_model")
    if values["eval_strategy"] == "no":
        return
    if metric is None:
        if values.get("save_strategy") == "best":
            raise UserError(
                "--save_strategy best needs --metric_for_best_model: loss, or another number that is evaluated"
            )
        return
    known = [*OF_EVERY_EVALUATION, *_metrics_of_tasks(values["eval_tasks"])]
    name = metric.removeprefix("eval_")
    if name not in (*known, OF_EXPERTS):
        raise UserError(
            f"--metric_for_best_model {metric} is no number of an evaluation of this run, which finds "
            f"{', '.join(known)}{suggestion(name, known) or ': name one of them'}"
        )
    if name.endswith("_nll") and values.get("greater_is_better") is None:
        raise UserError(
            f"--metric_for_best_model {metric}: the Trainer would keep the highest, and lower is better: set "
            "--greater_is_better false too"
        )


def exported_step(trainer: Trainer) -> int:
    """The step whose weights a run exports at its end: the last, or with `--load_best_model_at_end` the best.

    Args:
        trainer: that has trained to its end.
    """
    state = trainer.state
    is_best = trainer.args.load_best_model_at_end and state.best_model_checkpoint is not None
    return state.best_global_step if is_best else state.global_step


def _metrics_of_tasks(tasks: str | None) -> list[str]:
    read = read_tasks(tasks, "--eval_tasks") if tasks is not None else []
    return [f"{task.name}_{number}" for task in read for number in OF_TASKS]
