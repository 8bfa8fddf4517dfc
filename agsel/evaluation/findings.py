"""Results of rows as numbers of the whole."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from agsel.errors import UserError, one_line
from agsel.evaluation.work import Measured, Part
from agsel.replacing import replace_file

ROUNDED = 4
"""Decimals that people are shown."""
LARGEST_EXPONENT = math.log(sys.float_info.max)
"""A model that has diverged goes beyond it."""


def summarise(part: Part, rows: Sequence[Measured]) -> dict[str, Any]:
    """Numbers of a task: `rows`, `completion_tokens`, `nll` in nats per completion token, `correct`, `accuracy`.

    The last two only where texts were generated.
    """
    tokens, nll = _mean_loss(rows)
    numbers = {"rows": len(rows), "completion_tokens": tokens, "nll": nll}
    if part.judge is None:
        return numbers
    correct = sum(row["correct"] for row in rows)
    return numbers | {"correct": correct, "accuracy": correct / len(rows)}


def summarise_text(rows: Sequence[Measured]) -> dict[str, Any]:
    """Numbers of a text: `text_tokens`, `text_nll` in nats per token, `perplexity`."""
    tokens, nll = _mean_loss(rows)
    perplexity = math.inf if nll > LARGEST_EXPONENT else math.exp(nll)
    return {"text_tokens": tokens, "text_nll": nll, "perplexity": perplexity}


def _mean_loss(rows: Sequence[Measured]) -> tuple[int, float]:
    tokens = sum(row["completion_tokens"] for row in rows)
    return tokens, _mean(math.fsum(row["loss"] for row in rows), tokens)


def _mean(loss: float, tokens: int) -> float:
    """No number, if nothing is predicted: an answer of one token after an empty prompt."""
    return loss / tokens if tokens else math.nan


def describe_rows(part: Part, rows: Sequence[Measured]) -> Iterator[dict[str, Any]]:
    """Each row of a task by itself: its number, texts, and what was measured, `nll` in nats per completion token.

    Windows of a text are no rows.
    """
    for question, row in zip(part.questions, rows[: len(part.questions)], strict=True):
        asked = {"task": part.name, "row": question.number, "prompt": question.prompt}
        answered = {name: value for name, value in row.items() if name != "loss"}
        yield (
            asked | {"completion": question.completion, "nll": _mean(row["loss"], row["completion_tokens"])} | answered
        )


def print_results(results: Mapping[str, Any], indent: str = "") -> None:
    """One number a line."""
    for name, value in results.items():
        if isinstance(value, Mapping):
            print(f"{indent}{name}")
            print_results(value, indent=f"{indent}  ")
        else:
            shown = f"{value:.{ROUNDED}f}" if isinstance(value, float) else value
            print(f"{indent}{name:{max(1, 18 - len(indent))}}{shown}")


def prepare_output(path: Path) -> None:
    """Make the folder of `--output`, before any work that could be lost.

    Raises:
        UserError: it cannot be made, `path` is a folder itself, or the file of the rows, or something else that is
            not of an evaluation would be overwritten.
    """
    if path.is_dir():
        raise UserError(f"--output {path} is a folder: name a file, for example {path / 'results.json'}")
    if path.exists() and not path.is_file():
        raise UserError(f"--output {path} is no file that could be replaced: leave it out, or name another")
    for ending, what in ((".jsonl", "file for the rows"), (".parts", "folder for work in progress")):
        if path.suffix == ending:
            raise UserError(f"--output {path} is the name of the {what}: write {path.with_suffix('.json')}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make the folder of --output {path}, {error}: choose another file") from error
    for file, is_own in ((path, _is_summary), (path.with_suffix(".jsonl"), _is_row)):
        if file.is_file() and file.stat().st_size and not is_own(_read_first(file)):
            raise UserError(f"{file} is not of an evaluation, and --output {path} would overwrite it: choose another")


def _read_first(path: Path) -> Any:
    """The JSON value in a file, or in its first line."""
    try:
        with path.open(encoding="utf-8") as file:
            return json.loads(file.readline() if path.suffix == ".jsonl" else file.read())
    except (OSError, ValueError):
        return None


def _is_summary(value: Any) -> bool:
    measured = ("rows", "tasks", "text_tokens", "lm_eval")
    return isinstance(value, dict) and isinstance(value.get("model"), str) and any(name in value for name in measured)


def _is_row(value: Any) -> bool:
    return isinstance(value, dict) and {"task", "row", "completion", "nll"} <= value.keys()


def write_complete(path: Path, text: str) -> None:
    """A file that is complete or as it was before.

    Raises:
        UserError: it cannot be written.
    """
    try:
        replace_file(path, text)
    except OSError as error:
        raise UserError(f"cannot write {path} (--output): {one_line(error)}; choose another file") from error


def as_lines(rows: Sequence[Mapping[str, Any]]) -> str:
    """JSON Lines, with nothing else at which a text could be divided into lines."""
    return "".join(json.dumps(row) + "\n" for row in rows)
