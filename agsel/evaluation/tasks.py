"""Tasks that have names: where their rows come from, how they are asked, how answers are judged."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from agsel.data.fields import Fields
from agsel.data.sources import Source, kind_of
from agsel.errors import UserError, suggestion
from agsel.evaluation.answers import GSM8K, MATHS, Judge
from agsel.evaluation.extras import require_extra


@dataclass(frozen=True)
class Task:
    """What is asked and how it is judged.

    Attributes:
        name: in the results.
        source: of the rows to judge.
        fields: how a row is asked and answered.
        judge: of the generated texts.
        stop: texts at which a model has begun another problem; what it generates ends before the first of them.
        shots: of the solved examples; None for the first rows of `source`, which are then not judged.
    """

    name: str
    source: Source
    fields: Fields
    judge: Judge
    stop: tuple[str, ...] = ()
    shots: Source | None = None


TASKS = {
    task.name: task
    for task in (
        Task(
            "gsm8k",
            Source("openai/gsm8k", "test", "main", flag="--tasks"),
            Fields(prompt_template="Question: {question}\nAnswer:", completion_template=" {answer}"),
            GSM8K,
            stop=("Question:",),
            shots=Source("openai/gsm8k", "train", "main", flag="--tasks"),
        ),
        Task(
            "math",
            Source("HuggingFaceH4/MATH-500", "test", flag="--tasks"),
            Fields(prompt_template="Problem: {problem}\nSolution:", completion_template=" {solution}"),
            MATHS,
            stop=("Problem:",),
        ),
    )
}
"""By name; prompts are those of lm-evaluation-harness."""


def read_tasks(text: str, flag: str, source: Source | None = None, fields: Fields | None = None) -> list[Task]:
    """Tasks as the user names them: `gsm8k`, or `gsm8k=path/to/test.jsonl,math=path/to/math.jsonl`.

    Args:
        text: names, with commas between them, each with its data or without.
        flag: of the command line, for error messages.
        source: data of the only task, named by other flags.
        fields: columns, if the data have others than the task knows.

    Raises:
        UserError: no such task, one twice, or `source` for several tasks.
    """
    words = [word.strip() for word in text.split(",")]
    tasks = [_read_task(word, flag) for word in words]
    names = [task.name for task in tasks]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise UserError(f"{flag} names {twice} twice: leave one out")
    if source is not None:
        if len(tasks) > 1:
            raise UserError(
                f"--dataset names the rows of one task, and {flag} has {len(tasks)}: write {flag} "
                + ",".join(f"{name}=FILE" for name in names)
            )
        tasks = [replace(tasks[0], source=source, shots=None)]
    if "math" in names:
        require_extra("math_verify", f"{flag} math")
    return [replace(task, fields=fields) for task in tasks] if fields else tasks


def _read_task(word: str, flag: str) -> Task:
    name, has_data, data = word.partition("=")
    if name not in TASKS:
        raise UserError(f"unknown task {name!r} ({flag}): use {', '.join(TASKS)}{suggestion(name, TASKS)}")
    if not has_data:
        return TASKS[name]
    return replace(TASKS[name], source=Source(data, _only_split(data), flag=flag), shots=None)


def _only_split(data: str) -> str:
    """A local file has one; of a folder or hub dataset the rows for testing are meant."""
    return "train" if kind_of(Path(data)) else "test"
