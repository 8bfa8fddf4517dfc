"""The same model through lm-evaluation-harness, and where its verdicts are others than ours."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.attention import sdpa_kernel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from agsel.errors import UserError, complaints_of_libraries, one_line
from agsel.evaluation.extras import require_extra
from agsel.evaluation.measures import REPEATABLE
from agsel.evaluation.options import EvaluationArguments
from agsel.zero.consensus import gather

VERDICTS = ("exact_match", "acc")
"""What the harness calls them; 1 is right."""


def evaluate_with_harness(
    arguments: EvaluationArguments,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Mapping[str, Any]],
) -> dict[str, Any]:
    """Numbers by task of `--lm_eval`, on the first rank at least. Every rank must call it.

    Args:
        arguments: name tasks, rows at a time and at most, and shots.
        model: on its device.
        tokenizer: of it.
        rows: with `prompt` and `correct`, as `describe_rows` has them.

    Returns:
        By task: what the harness found, and, if some of its prompts are among `rows`, how many were `compared`, and
        the `differences`.

    Raises:
        UserError: no such task, or the harness does not take it.
    """
    from lm_eval import simple_evaluate

    logging.getLogger("lm_eval").setLevel(logging.WARNING)
    assert arguments.lm_eval is not None, "asked for"
    tasks = tasks_of_harness(arguments.lm_eval)
    manager = require_tasks(tasks)
    rows_of_tasks = [len(task.eval_docs) for task in manager.load(list(tasks))["tasks"].values()]
    fewest = min([*rows_of_tasks, *filter(None, [arguments.limit])])
    with complaints_of_libraries(), sdpa_kernel([*REPEATABLE]):
        found = simple_evaluate(
            _model_of_harness(model, tokenizer, arguments.batch_size, divided=fewest >= dist.get_world_size()),
            tasks=list(tasks),
            task_manager=manager,
            num_fewshot=arguments.n_shot or None,
            limit=arguments.limit,
            log_samples=True,
        )
    if found is None:
        return {}
    ours = {row["prompt"]: row["correct"] for row in rows if "correct" in row}
    return {
        task: _plain(numbers) | _compare(ours, found["samples"].get(task, ()))
        for task, numbers in found["results"].items()
    }


def tasks_of_harness(text: str) -> tuple[str, ...]:
    """The tasks that `--lm_eval` names."""
    return tuple(name.strip() for name in text.split(","))


@cache  # those of the harness take seconds to find
def require_tasks(tasks: tuple[str, ...]) -> Any:
    """What knows these tasks; those of the harness only if one is no file.

    Raises:
        UserError: the harness is not installed, or cannot load them.
    """
    require_extra("lm_eval", "--lm_eval")
    from lm_eval.tasks import TaskManager

    missing = next((task for task in tasks if task.endswith(".yaml") and not Path(task).is_file()), None)
    if missing is not None:
        raise UserError(f"cannot load {missing} (--lm_eval): no such file")
    manager = TaskManager(include_defaults=not all(Path(task).is_file() for task in tasks))
    try:
        manager.load(list(tasks))
    except Exception as error:  # whatever the harness stumbles over in its files
        raise UserError(f"cannot load {', '.join(tasks)} (--lm_eval): {one_line(error.__cause__ or error)}") from error
    return manager


def _plain(numbers: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in numbers.items() if isinstance(value, int | float)}


def _compare(ours: Mapping[str, bool], samples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    theirs = [(sample, prompt) for sample in samples if (prompt := sample["arguments"][0][0]) in ours]
    if not theirs:
        return {}
    return {"compared": len(theirs), "differences": list(_differences(ours, theirs))}


def _differences(ours: Mapping[str, bool], theirs: Sequence[tuple[Mapping[str, Any], str]]) -> Iterator[dict[str, Any]]:
    for sample, prompt in theirs:
        verdict = next((bool(sample[name]) for name in VERDICTS if name in sample), None)
        if verdict is not None and verdict != ours[prompt]:
            filtered = {"filter": sample["filter"], "generated": sample["resps"][0][0]}
            yield {"prompt": prompt, "agsel": ours[prompt], "lm_eval": verdict, **filtered}


def _model_of_harness(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, batch_size: int, *, divided: bool
) -> Any:
    """A model for the harness.

    Args:
        model: on its device.
        tokenizer: of it.
        batch_size: rows at a time.
        divided: whether each rank does a part of the rows; the harness fails on a rank without any. Else each does all.
    """
    from lm_eval.models.huggingface import HFLM

    class ModelOfRank(HFLM):
        """A loaded model, of which every rank of the run has one: the harness itself expects Accelerate's ranks."""

        def __init__(self) -> None:
            super().__init__(model, tokenizer=tokenizer, batch_size=batch_size)
            if divided:
                self._rank, self._world_size = dist.get_rank(), dist.get_world_size()

        def all_gather(self, tensor: Any) -> Any:
            """A tensor with the numbers of all ranks."""
            return torch.cat([torch.atleast_1d(of_rank) for of_rank in gather(tensor.cpu(), None)])

        def barrier(self) -> None:
            """Wait for all ranks."""
            dist.barrier()

    return ModelOfRank()
