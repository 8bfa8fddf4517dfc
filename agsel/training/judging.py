"""The model judged on tasks while it trains, as by `launch/evaluate.py`: on all ranks, in step with each other."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
import torch.distributed as dist
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

from agsel.evaluation.findings import summarise
from agsel.evaluation.limits import require_embedded
from agsel.evaluation.questions import read_questions
from agsel.evaluation.tasks import Task, read_tasks
from agsel.evaluation.work import Measured, Measurer, Part, Unit, cut_into_units, put_together
from agsel.monitor.progress import Progress
from agsel.training.arguments import TaskArguments
from agsel.training.best import OF_TASKS
from agsel.zero.consensus import first_rank_does, gather

BATCH_SIZE = 128
"""Rows at a time, at most; fewer where memory ends."""


class TaskJudge:
    """Answers the rows of some tasks with the model of a Trainer.

    Args:
        arguments: name the tasks.
        tokenizer: of the model.
        model: that is to be judged.

    Raises:
        UserError: on every rank; no such task, or a row that cannot be judged.
    """

    def __init__(self, arguments: TaskArguments, tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> None:
        assert arguments.eval_tasks is not None, "asked for"
        self._tokenizer = tokenizer
        tasks = read_tasks(arguments.eval_tasks, "--eval_tasks")
        self._parts = first_rank_does(partial(_read_parts, tasks, arguments, tokenizer), None)
        require_embedded(model, self._parts)
        self._units: list[Unit] | None = None

    def metrics(self, trainer: Trainer) -> dict[str, float]:
        """`eval_TASK_nll`, in nats per completion token, and `eval_TASK_accuracy`. Every rank must call it."""
        with _evaluating(trainer.model):
            if self._units is None:
                self._units = cut_into_units(trainer.model, self._parts, BATCH_SIZE)
            rows = put_together(self._parts, self._units, self._measure(trainer, self._units))
        return {
            f"eval_{part.name}_{name}": float(value)
            for part, of_part in zip(self._parts, rows, strict=True)
            for name, value in summarise(part, of_part).items()
            if name in OF_TASKS
        }

    def _measure(self, trainer: Trainer, units: Sequence[Unit]) -> dict[int, list[Measured]]:
        """Every rank does a unit of the same kind at a time, as ZeRO-3 gathers weights for all ranks together."""
        measurer = Measurer(trainer.model, self._tokenizer, self._parts, in_step=is_deepspeed_zero3_enabled())
        found: dict[int, list[Measured]] = {}
        rounds = list(_rounds(units, dist.get_world_size()))
        with Progress("judging", len(rounds), shown=trainer.is_world_process_zero()) as progress:
            for numbers in rounds:
                number = numbers[dist.get_rank()]
                found[number] = measurer.measure(units[number])
                progress.advance(1)
                trainer.callback_handler.on_prediction_step(trainer.args, trainer.state, trainer.control)
        return {number: of_unit for of_rank in gather(found, None) for number, of_unit in of_rank.items()}


def _read_parts(tasks: Sequence[Task], arguments: TaskArguments, tokenizer: PreTrainedTokenizerBase) -> list[Part]:
    rows, tokens = arguments.eval_task_rows, arguments.eval_max_new_tokens
    return [
        Part.of(task, read_questions(task, tokenizer, n_shot=0, limit=rows, generates=True), tokens) for task in tasks
    ]


def _rounds(units: Sequence[Unit], ranks: int) -> Iterator[list[int]]:
    """Numbers of units, one for each rank; where there are not enough for all, some do the same."""
    for kind in dict.fromkeys(unit.kind for unit in units):
        numbers = [number for number, unit in enumerate(units) if unit.kind == kind]
        for first in range(0, len(numbers), ranks):
            yield [numbers[(first + rank) % len(numbers)] for rank in range(ranks)]


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """In evaluation mode, and without compiling: every length would be compiled anew."""
    was_training = model.training
    model.eval()
    try:
        with torch.compiler.set_stance("force_eager"):
            yield
    finally:
        model.train(was_training)
