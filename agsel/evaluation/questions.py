"""Rows as tokens: what the model is asked, and which tokens of the right answer count."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import NamedTuple

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from agsel.data.chat import ChatEncoder, Message
from agsel.data.formats import ROW_NUMBER, read_rows
from agsel.data.sources import Row, Source
from agsel.data.tokens import Encoder, Learning, added_tokens, encode_open, encode_text
from agsel.errors import UserError, said_of
from agsel.evaluation.tasks import TASKS, Task

BETWEEN_SHOTS = "\n\n"


class Example(NamedTuple):
    """A row as tokens.

    Attributes:
        prompt: from which the model generates.
        sequence: prompt and completion as in training.
        counted: for each token of `sequence`, whether it belongs to the completion.
    """

    prompt: list[int]
    sequence: list[int]
    counted: list[bool]


class Question(NamedTuple):
    """A row to judge.

    Attributes:
        number: of the row.
        prompt: as text.
        completion: the right one, as text.
        example: both as tokens.
    """

    number: int
    prompt: str
    completion: str
    example: Example


class Asker:
    """Makes questions of the rows of `agsel.data.formats`, as they are tokenised for training.

    Args:
        tokenizer: of the model.
        shots: text before each prompt.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, shots: str = "") -> None:
        self._tokenizer, self._shots = tokenizer, shots
        self._encoder = Encoder(tokenizer, Learning())
        self._chat: ChatEncoder | None = None

    def ask(self, row: Row) -> Question:
        """A row of text, or the last turn of the assistant in a conversation.

        Raises:
            UserError: the chat template does not take the conversation.
        """
        if self._encoder.is_text(row):
            prompt = self._shots + row["prompt"]
            example = encode_example(prompt, row["completion"], self._tokenizer)
            return Question(row[ROW_NUMBER], prompt, row["completion"], example)
        return self._ask_in_turns(row)

    def _ask_in_turns(self, row: Row) -> Question:
        if self._chat is None:
            self._chat = ChatEncoder(self._tokenizer, assistant_only=True)
        messages = json.loads(row["messages"])
        last = max(number for number, message in enumerate(messages) if _answers(message))
        tools = json.loads(row["tools"]) if row["tools"] else None
        tokens = self._chat.encode(messages[: last + 1], tools, last, row[ROW_NUMBER])
        prompt = self._chat.prompt(messages, tools, last, row[ROW_NUMBER])
        asked = self._tokenizer(prompt, add_special_tokens=False)["input_ids"]
        example = Example(list(asked), tokens.ids, tokens.learnt)
        return Question(row[ROW_NUMBER], prompt, messages[last]["content"], example)


def _answers(message: Message) -> bool:
    return message["role"] == "assistant" and bool(message["content"].strip() or message.get("tool_calls"))


def encode_example(prompt: str, completion: str, tokenizer: PreTrainedTokenizerBase) -> Example:
    """Prompt and completion as they are tokenised for training."""
    tokens = encode_text(tokenizer, prompt, completion, Learning())
    return Example(encode_open(tokenizer, prompt), tokens.ids, tokens.learnt)


def read_questions(
    task: Task, tokenizer: PreTrainedTokenizerBase, *, n_shot: int, limit: int | None, generates: bool
) -> list[Question]:
    """The rows of a task.

    Args:
        task: whose rows.
        tokenizer: of the model.
        n_shot: solved examples before each prompt.
        limit: take only the first rows.
        generates: whether the model will be asked.

    Raises:
        UserError: no such data, a row that cannot be asked or judged, or too few rows.
    """
    if tokenizer.eos_token is None:
        raise UserError(
            f"the tokenizer of {tokenizer.name_or_path} has no end-of-sequence token, by which an answer ends: set "
            "eos_token in its tokenizer_config.json"
        )
    with said_of(f"task {task.name}") if task.name in TASKS else nullcontext():
        rows, _ = read_rows(task.source, task.fields)
    shots = _read_shots(task, rows, n_shot)
    first = n_shot if task.shots is None else 0
    if first >= len(rows):
        raise UserError(f"{task.source.name} has {len(rows)} rows, of which --n_shot {n_shot} leaves none to judge")
    chosen = rows.select(range(first, min(len(rows), first + (limit or len(rows)))))
    asker = Asker(tokenizer, shots)
    questions = [asker.ask(row) for row in chosen]
    if generates:
        for question in questions:
            _require_asked(task, question)
    return questions


def _read_shots(task: Task, rows: Dataset, number: int) -> str:
    if not number:
        return ""
    if task.shots is not None:
        rows, _ = read_rows(replace(task.shots, split=f"{task.shots.split}[:{number}]"), task.fields)
    shown: Sequence[Row] = rows.select(range(min(number, len(rows)))).to_list()
    if any(row["prompt"] is None for row in shown):
        raise UserError("--n_shot needs prompts of text, and the dataset has conversations: leave it out")
    return "".join(f"{row['prompt']}{row['completion']}{BETWEEN_SHOTS}" for row in shown)


def _require_asked(task: Task, question: Question) -> None:
    task.judge.require_answer(question.completion, question.number)
    if not question.example.prompt:
        raise UserError(
            f"row {question.number} of {task.source.name} has an empty prompt, from which nothing can be generated: "
            "--skip_generation"
        )


def read_text(path: str, tokenizer: PreTrainedTokenizerBase, window: int) -> list[Example]:
    """A plain text file in windows; every token but the first counts once, each seen after those of its own window.

    Windows begin as all texts of the tokenizer do, as with `<s>`, without which some models predict badly.

    Args:
        path: of the file.
        tokenizer: of the model.
        window: tokens that are predicted in one, at most.

    Raises:
        UserError: it cannot be read, or has fewer than two tokens.
    """
    source = Source(path, flag="--perplexity")
    try:
        with open(path, encoding="utf-8") as file:
            text = file.read()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {source.name} (--perplexity): {error}; name a text file in UTF-8") from error
    tokens = list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
    if len(tokens) < 2:
        raise UserError(f"{path} (--perplexity) has {len(tokens)} tokens: it needs two at least")
    before, _ = added_tokens(tokenizer)
    window = max(1, window - len(before))
    starts = range(0, len(tokens) - 1, window)
    return [_window(before, tokens[start : start + window + 1]) for start in starts]


def _window(before: list[int], tokens: list[int]) -> Example:
    return Example([], before + tokens, [False] * (len(before) + 1) + [True] * (len(tokens) - 1))
