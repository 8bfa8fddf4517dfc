"""What a model has embeddings for: tokens of its vocabulary, and positions if it has learnt them one by one."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn
from transformers import PreTrainedModel

from agsel.errors import UserError
from agsel.evaluation.work import Part

WINDOW = 1024
"""Tokens of a plain text that are predicted in one forward, at most."""


def learnt_positions(model: PreTrainedModel) -> int | None:
    """How many there are; None for a model that computes them."""
    limit = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    if limit is None or not any(_are_positions(name, module, limit) for name, module in model.named_modules()):
        return None
    return limit


def _are_positions(name: str, module: nn.Module, limit: int) -> bool:
    is_table = isinstance(module, nn.Embedding) and module.num_embeddings >= limit
    return is_table and any(word in name.rpartition(".")[2] for word in ("position", "wpe"))


def window_of(model: PreTrainedModel) -> int:
    """Tokens of a plain text to predict in one forward; the model is given one more."""
    limit = learnt_positions(model)
    return WINDOW if limit is None else min(WINDOW, limit - 1)


def require_embedded(model: PreTrainedModel, parts: Sequence[Part]) -> None:
    """Refuse rows that a model cannot read, or not answer, instead of failing in the middle of a forward.

    Raises:
        UserError: names the row.
    """
    vocabulary = model.config.get_text_config(decoder=True).vocab_size
    positions = learnt_positions(model)
    for part in parts:
        for place, example in enumerate(part.examples):
            row = f"row {part.questions[place].number} of {part.name}" if part.questions else f"{part.name}"
            largest = max([*example.sequence, *example.prompt])
            if largest >= vocabulary:
                raise UserError(
                    f"{row} has the token {largest} of the tokenizer, and the model has embeddings for {vocabulary:,}: "
                    "use the tokenizer that belongs to the model"
                )
            generated = 0 if part.judge is None else part.max_new_tokens
            needed = max(len(example.sequence), len(example.prompt) + generated)
            if positions is not None and needed > positions:
                raise UserError(
                    f"{row} needs {needed:,} positions, of which {generated:,} for the answer, and the model has "
                    f"learnt {positions:,}: shorten the row, or the answer (--max_new_tokens, while training "
                    "--eval_max_new_tokens)"
                )
