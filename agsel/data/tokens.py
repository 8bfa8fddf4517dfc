"""Rows as tokens and labels, as the Trainer takes them; and what there is to know about them before training."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import pyarrow.compute as pc
from datasets import Dataset, Features, Value
from datasets import Sequence as ListOf
from transformers import PreTrainedTokenizerBase
from trl.data_utils import common_prefix_length

from agsel.data.chat import ChatEncoder, Tokens
from agsel.data.formats import ROW_NUMBER
from agsel.data.sources import Row

NOT_LEARNT = -100
"""The label of such a token, as PyTorch's cross-entropy has it."""
TOKEN_FEATURES = Features(
    {"input_ids": ListOf(Value("int32")), "labels": ListOf(Value("int64")), ROW_NUMBER: Value("int64")}
)


@dataclass(frozen=True)
class Learning:
    """What is learnt of a row.

    Attributes:
        completions_only: not the prompt of a text.
        assistant_only: of a conversation what the assistant says.
    """

    completions_only: bool = True
    assistant_only: bool = True


class Encoder:
    """Makes tokens of the rows of `agsel.data.formats`.

    Args:
        tokenizer: of the model.
        learning: what is learnt.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, learning: Learning) -> None:
        self._tokenizer, self._learning = tokenizer, learning
        self._chat: ChatEncoder | None = None

    def encode(self, row: Row) -> Tokens:
        """Text where there is some and no turns, else the conversation."""
        if row["messages"] is None or (row["completion"] is not None and not self._tokenizer.chat_template):
            return encode_text(self._tokenizer, row["prompt"], row["completion"], self._learning)
        if self._chat is None:
            self._chat = ChatEncoder(self._tokenizer, assistant_only=self._learning.assistant_only)
        tools = json.loads(row["tools"]) if row["tools"] else None
        first = row["first_learnt"] if self._learning.completions_only else 0
        return self._chat.encode(json.loads(row["messages"]), tools, first, row[ROW_NUMBER])

    def labelled(self, row: Row) -> dict[str, Any]:
        """Tokens and labels of a row."""
        tokens = self.encode(row)
        labels = [token if learnt else NOT_LEARNT for token, learnt in zip(tokens.ids, tokens.learnt, strict=True)]
        return {"input_ids": tokens.ids, "labels": labels}


def encode_text(tokenizer: PreTrainedTokenizerBase, prompt: str, completion: str, learning: Learning) -> Tokens:
    """Prompt and completion in one string, as TRL's SFTTrainer makes it, with an end-of-sequence token.

    The completion starts where the tokens of the prompt alone and of both together part.
    """
    if not completion.endswith(tokenizer.eos_token):
        completion += tokenizer.eos_token
    whole = tokenizer(prompt + completion)["input_ids"]
    start = common_prefix_length(tokenizer(prompt)["input_ids"], whole) if learning.completions_only else 0
    return Tokens(whole, [place >= start for place in range(len(whole))])


def tokenise(rows: Dataset, tokenizer: PreTrainedTokenizerBase, learning: Learning, processes: int | None) -> Dataset:
    """`input_ids` and `labels` of every row, and its number.

    Args:
        rows: of `agsel.data.formats`.
        tokenizer: of the model.
        learning: what is learnt.
        processes: that share the work.

    Raises:
        UserError: a conversation that the chat template does not take.
    """
    kept = [name for name in rows.column_names if name not in TOKEN_FEATURES]
    return rows.map(
        Encoder(tokenizer, learning).labelled,
        remove_columns=kept,
        features=TOKEN_FEATURES,
        num_proc=processes,
        desc="Tokenising",
    )


@dataclass(frozen=True)
class TokenReport:
    """What the tokens of a dataset are like before they are cut.

    Attributes:
        rows: how many.
        tokens: of all rows.
        learnt: of these.
        longest: tokens of a row, at most.
        cut: rows that are longer than allowed, and so lose their end.
    """

    rows: int
    tokens: int
    learnt: int
    longest: int
    cut: int

    @classmethod
    def of(cls, tokenised: Dataset, max_length: int | None) -> TokenReport:
        """Of a dataset of `tokenise`."""
        lengths = pc.list_value_length(tokenised.data.column("input_ids"))
        labels = pc.list_flatten(tokenised.data.column("labels"))
        cut = pc.sum(pc.greater(lengths, max_length)).as_py() if max_length else 0
        learnt = pc.sum(pc.not_equal(labels, NOT_LEARNT)).as_py()
        return cls(len(tokenised), pc.sum(lengths).as_py(), learnt or 0, pc.max(lengths).as_py(), cut or 0)

    def describe(self, max_length: int | None) -> str:
        """In a line."""
        said = f"{self.tokens / self.rows:,.0f} a row, {self.longest:,} at most; {self.learnt / self.tokens:.0%} learnt"
        if not self.cut:
            return said
        lose = "loses" if self.cut == 1 else "lose"
        return f"{said}; {self.cut:,} of {self.rows:,} rows cut at --max_length {max_length} {lose} their end token"
