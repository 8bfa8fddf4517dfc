"""Rows as tokens and labels, as the Trainer takes them; and what there is to know about them before training."""

from __future__ import annotations

import gc
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import pyarrow.compute as pc
from datasets import Dataset, Features, Value
from datasets import Sequence as ListOf
from transformers import PreTrainedTokenizerBase
from trl.data_utils import common_prefix_length

from agsel.data.chat import ChatEncoder, Endings, Tokens
from agsel.data.formats import ROW_NUMBER, first_row, rules
from agsel.data.sources import Row
from agsel.errors import UserError

NOT_LEARNT = -100
"""The label of such a token, as PyTorch's cross-entropy has it."""
SOME_TEXT = "a"
ENDED = "agsel_ended"
"""Column: whether what is learnt of a row ends with a token that ends a text or a turn, but for space."""
TOKEN_FEATURES = Features(
    {
        "input_ids": ListOf(Value("int32")),
        "labels": ListOf(Value("int64")),
        ROW_NUMBER: Value("int64"),
        ENDED: Value("bool"),
    }
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

    def describe(self, rows: Dataset) -> str:
        """Of the rows of `agsel.data.formats`, in a few words."""
        kinds = {
            "on completions": self.completions_only and _any_text(rows),
            "on assistant messages": self.assistant_only and has_conversations(rows),
        }
        return " and ".join(name for name, chosen in kinds.items() if chosen) or "on all tokens"


def first_conversation(rows: Dataset) -> int | None:
    """Number of the first one among the rows of `agsel.data.formats`."""
    return first_row(rows, "messages", pc.is_valid)


def has_conversations(rows: Dataset) -> bool:
    """Whether some of the rows of `agsel.data.formats` are."""
    return first_conversation(rows) is not None


def _any_text(rows: Dataset) -> bool:
    return first_row(rows, "messages", pc.is_null) is not None


class Encoder:
    """Makes tokens of the rows of `agsel.data.formats`.

    Args:
        tokenizer: of the model.
        learning: what is learnt.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, learning: Learning) -> None:
        self._tokenizer, self._learning, self._rules = tokenizer, learning, rules()
        self._endings = Endings(tokenizer)
        self._chat: ChatEncoder | None = None

    def encode(self, row: Row) -> Tokens:
        """Text where there is some and no turns, else the conversation."""
        if self.is_text(row):
            return encode_text(self._tokenizer, row["prompt"], row["completion"], self._learning)
        if self._chat is None:
            self._chat = ChatEncoder(self._tokenizer, assistant_only=self._learning.assistant_only)
        tools = json.loads(row["tools"]) if row["tools"] else None
        first = row["first_learnt"] if self._learning.completions_only else 0
        return self._chat.encode(json.loads(row["messages"]), tools, first, row[ROW_NUMBER])

    def is_text(self, row: Row) -> bool:
        """Whether a row is taken as text, and not as a conversation."""
        return row["messages"] is None or (row["completion"] is not None and not self._tokenizer.chat_template)

    def labelled(self, row: Row) -> dict[str, Any]:
        """A row of `TOKEN_FEATURES`."""
        tokens = self.encode(row)
        labels = [token if learnt else NOT_LEARNT for token, learnt in zip(tokens.ids, tokens.learnt, strict=True)]
        learnt = [label for label in labels if label != NOT_LEARNT]
        ended = self._endings.behind(learnt, 0) is not None
        return {"input_ids": tokens.ids, "labels": labels, ROW_NUMBER: row[ROW_NUMBER], ENDED: ended}


@lru_cache(maxsize=4)
def added_tokens(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """What a tokenizer puts before and behind every text by itself, as `<s>` and `</s>`."""
    bare, whole = (list(tokenizer(SOME_TEXT, add_special_tokens=special)["input_ids"]) for special in (False, True))
    places = [place for place in range(len(whole)) if whole[place : place + len(bare)] == bare]
    return (whole[: places[0]], whole[places[0] + len(bare) :]) if places else ([], [])


def encode_open(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """The tokens of a text that goes on, without those that end every text of some tokenizers."""
    ids, behind = list(tokenizer(text)["input_ids"]), added_tokens(tokenizer)[1]
    return ids[: len(ids) - len(behind)]


def encode_text(tokenizer: PreTrainedTokenizerBase, prompt: str, completion: str, learning: Learning) -> Tokens:
    """Prompt and completion in one string, as TRL's SFTTrainer makes it, with an end-of-sequence token.

    The completion starts where the tokens of the prompt alone and of both together part.
    """
    if not completion.endswith(tokenizer.eos_token):
        completion += tokenizer.eos_token
    whole = encode_open(tokenizer, prompt + completion)
    start = common_prefix_length(encode_open(tokenizer, prompt), whole) if learning.completions_only else 0
    return Tokens(whole, [place >= start for place in range(len(whole))])


def tokenise(rows: Dataset, tokenizer: PreTrainedTokenizerBase, learning: Learning, processes: int | None) -> Dataset:
    """Every row in `TOKEN_FEATURES`.

    Args:
        rows: of `agsel.data.formats`.
        tokenizer: of the model.
        learning: what is learnt.
        processes: that share the work.

    Raises:
        UserError: a conversation that the chat template does not take; or one of the processes has died.
    """
    with _forking():
        return rows.map(
            Encoder(tokenizer, learning).labelled,
            remove_columns=rows.column_names,
            features=TOKEN_FEATURES,
            num_proc=processes,
            desc="Tokenising",
        )


@contextmanager
def _forking() -> Iterator[None]:
    """Processes that are forked off leave this one's garbage alone: its finalizers may wait for threads left behind."""
    gc.freeze()
    try:
        yield
    except RuntimeError as error:
        if "abruptly died" not in str(error):
            raise
        remedy = "start again with fewer (--dataset_num_proc), or 1, which would tell why"
        raise UserError(f"a process that tokenises has died, as for want of memory: {remedy}") from error
    finally:
        gc.unfreeze()


@dataclass(frozen=True)
class TokenReport:
    """What the tokens of a dataset are like before they are cut.

    Attributes:
        rows: how many.
        tokens: of all rows.
        learnt: of these.
        longest: tokens of a row, at most.
        longest_kept: tokens of a row that are kept, at most; None for all.
        cut: rows that are longer.
        endless: rows of which no token is learnt that ends a text or a turn, though they are not cut.
    """

    rows: int
    tokens: int
    learnt: int
    longest: int
    longest_kept: int | None
    cut: int
    endless: int

    @classmethod
    def of(cls, tokenised: Dataset, longest_kept: int | None) -> TokenReport:
        """Of a dataset of `tokenise`."""
        lengths = pc.list_value_length(tokenised.data.column("input_ids"))
        labels = pc.list_flatten(tokenised.data.column("labels"))
        is_cut = pc.greater(lengths, longest_kept if longest_kept is not None else pc.max(lengths))
        is_endless = pc.and_not(pc.invert(tokenised.data.column(ENDED)), is_cut)
        counts = [pc.sum(mask).as_py() or 0 for mask in (pc.not_equal(labels, NOT_LEARNT), is_cut, is_endless)]
        learnt, cut, endless = counts
        tokens, longest = pc.sum(lengths).as_py(), pc.max(lengths).as_py()
        return cls(len(tokenised), tokens, learnt, longest, longest_kept, cut, endless)

    def describe(self, *, loses_end: bool) -> str:
        """In a line.

        Args:
            loses_end: whether the end of a row is cut, and not its beginning.
        """
        said = f"{self.tokens / self.rows:,.0f} a row, {self.longest:,} at most; {self.learnt / self.tokens:.0%} learnt"
        if self.cut:
            lost = "end token" if loses_end else "beginning"
            said += f"; {self._of_all(self.cut)} cut at --max_length {self.longest_kept}, without their {lost}"
        return said + (f"; {self._of_all(self.endless)} without a learnt end token" if self.endless else "")

    def _of_all(self, rows: int) -> str:
        return f"{rows:,} of {self.rows:,} rows"
