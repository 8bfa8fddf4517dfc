"""All that is to be measured, cut into units, and the units divided among the ranks."""

from __future__ import annotations

import hashlib
import pickle
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from agsel.evaluation.answers import Judge
from agsel.evaluation.batches import form_batches, tokens_in_memory
from agsel.evaluation.measures import generate, in_parts, token_losses
from agsel.evaluation.questions import Example, Question
from agsel.evaluation.tasks import Task

Kind = Literal["losses", "texts"]
Measured = dict[str, Any]
"""What is known of a row, as plain values."""


@dataclass(frozen=True)
class Part:
    """Rows of one task, or windows of one text.

    Attributes:
        name: in the results.
        examples: as tokens.
        questions: what the examples ask; empty for windows of a text, of which nothing is generated.
        judge: of generated texts; None where nothing is generated.
        stop: texts that end what is generated.
        max_new_tokens: generated per row, at most.
    """

    name: str
    examples: Sequence[Example]
    questions: Sequence[Question] = ()
    judge: Judge | None = None
    stop: tuple[str, ...] = ()
    max_new_tokens: int = 0

    @classmethod
    def of(cls, task: Task, questions: Sequence[Question], max_new_tokens: int | None) -> Part:
        """Rows of a task.

        Args:
            task: of the rows.
            questions: made of them.
            max_new_tokens: generated per row, at most; None for nothing.
        """
        examples = [question.example for question in questions]
        if max_new_tokens is None:
            return cls(task.name, examples, questions)
        return cls(task.name, examples, questions, task.judge, task.stop, max_new_tokens)

    def fingerprint(self) -> str:
        """Of all that results depend on."""
        digest = hashlib.sha256(f"{self.name} {self.stop} {self.max_new_tokens}".encode())
        digest.update(pickle.dumps(self.judge))
        for example in self.examples:
            digest.update(str(example).encode())
        for question in self.questions:
            digest.update(question.completion.encode())
        return digest.hexdigest()


class Unit(NamedTuple):
    """What a rank does in one go.

    Attributes:
        kind: of the measure.
        part: place of the part.
        rows: places of the examples in it.
    """

    kind: Kind
    part: int
    rows: list[int]


def cut_into_units(model: PreTrainedModel, parts: Sequence[Part], batch_size: int) -> list[Unit]:
    """Every row of every part, once for each measure. Every rank must call it, and gets the same.

    Args:
        model: on its device, to know how many tokens fit.
        parts: to measure.
        batch_size: rows of a unit, at most.
    """
    fitting = {generates: tokens_in_memory(model, generates=generates) for generates in (False, True)}
    return [unit for place, part in enumerate(parts) for unit in _units_of(place, part, batch_size, fitting)]


def _units_of(place: int, part: Part, batch_size: int, fitting: Mapping[bool, int]) -> Iterator[Unit]:
    lengths = [len(example.sequence) for example in part.examples]
    for rows in form_batches(lengths, batch_size, fitting[False]):
        yield Unit("losses", place, rows)
    if part.judge is not None:
        lengths = [len(example.prompt) + part.max_new_tokens for example in part.examples]
        for rows in form_batches(lengths, batch_size, fitting[True]):
            yield Unit("texts", place, rows)


class Measurer:
    """Measures units with a model.

    Args:
        model: in evaluation mode, on its device.
        tokenizer: of it.
        parts: that units are of.
        in_step: ranks do every forward together, as at ZeRO-3: none may halve a unit for which it has no memory.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        parts: Sequence[Part],
        *,
        in_step: bool = False,
    ) -> None:
        self._model, self._tokenizer, self._parts, self._in_step = model, tokenizer, parts, in_step

    @torch.no_grad()  # not in inference mode: ZeRO-3 goes on to train with what it gathers here
    def measure(self, unit: Unit) -> list[Measured]:
        """One result for each row of a unit.

        Raises:
            RunError: the GPU has no memory for a single row.
            OutOfMemoryError: it has none for the unit, and ranks are in step.
        """
        work = self._losses if unit.kind == "losses" else self._texts
        part = self._parts[unit.part]
        return work(part, unit.rows) if self._in_step else in_parts(lambda rows: work(part, rows), unit.rows)

    def _losses(self, part: Part, rows: Sequence[int]) -> list[Measured]:
        losses = token_losses(self._model, [part.examples[row] for row in rows])
        return [{"loss": tokens.double().sum().item(), "completion_tokens": len(tokens)} for tokens in losses]

    def _texts(self, part: Part, rows: Sequence[int]) -> list[Measured]:
        assert part.judge is not None, "texts are of parts with a judge"
        prompts = [part.examples[row].prompt for row in rows]
        texts = generate(self._model, self._tokenizer, prompts, part.max_new_tokens, part.stop)
        references = [part.questions[row].completion for row in rows]
        return [
            {"generated": text, "correct": part.judge.is_right(text, reference)}
            for text, reference in zip(texts, references, strict=True)
        ]


def share_of(numbers: Sequence[int], rank: int, ranks: int) -> list[int]:
    """The units that a rank does: those of neighbouring sizes go to different ranks."""
    return list(numbers[rank::ranks])


def put_together(
    parts: Sequence[Part], units: Sequence[Unit], results: Mapping[int, list[Measured]]
) -> list[list[Measured]]:
    """All that is known of each row, by part, from the results of all units by their numbers."""
    rows: list[list[Measured]] = [[{} for _ in part.examples] for part in parts]
    for number, unit in enumerate(units):
        for row, measured in zip(unit.rows, results[number], strict=True):
            rows[unit.part][row] |= measured
    return rows
