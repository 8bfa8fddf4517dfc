"""Conversations as tokens, and which of them are learnt: what the assistant says, and nothing else.

A chat template that marks the assistant's words with `{% generation %}` tells itself. For many others TRL has one that
renders the same and does. For all the rest the conversation is rendered again and again, up to each turn: what comes
after the prompt for an answer, through the token that ends the turn, is the answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase
from trl.chat_template_utils import get_training_chat_template, has_generation_markers

from agsel.errors import UserError, one_line

Message = dict[str, Any]


@dataclass(frozen=True)
class Tokens:
    """A row as tokens.

    Attributes:
        ids: of the tokens.
        learnt: for each of them, whether it is.
    """

    ids: list[int]
    learnt: list[bool]


class ChatEncoder:
    """Renders conversations with a tokenizer's chat template.

    Args:
        tokenizer: with a chat template.
        assistant_only: learn what the assistant says; otherwise every token is.

    Raises:
        UserError: the tokenizer has no chat template.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *, assistant_only: bool) -> None:
        if not tokenizer.chat_template:
            raise UserError(
                f"the dataset holds conversations, but the tokenizer of {tokenizer.name_or_path} has no chat template: "
                "name one (--chat_template_path), or make text of the columns (--prompt_template, "
                "--completion_template)"
            )
        self._tokenizer = tokenizer
        self._assistant_only = assistant_only
        self._marking = marking_template(tokenizer) if assistant_only else None
        self._end_ids = special_ids(tokenizer)

    def encode(self, messages: Sequence[Message], tools: list[Any] | None, first_learnt: int, row: int) -> Tokens:
        """A conversation.

        Args:
            messages: all of it.
            tools: that the assistant may call.
            first_learnt: number of the first message that may be learnt.
            row: for error messages.

        Raises:
            UserError: the template does not take the conversation, or does not tell what the assistant says.
        """
        try:
            self._require_calls(messages, tools, row)
            return self._encode(list(messages), tools, first_learnt, row)
        except _TemplateFault as error:
            raise UserError(
                f"the chat template of {self._tokenizer.name_or_path} fails on row {row} of the dataset, {error}; "
                "correct the row or the template, or name another (--chat_template_path)"
            ) from error

    def _require_calls(self, messages: Sequence[Message], tools: list[Any] | None, row: int) -> None:
        """Many templates say nothing of tool calls: a turn would be learnt as if there were none."""
        without = [{name: value for name, value in message.items() if name != "tool_calls"} for message in messages]
        if without != messages and self._render(without, tools) == self._render(list(messages), tools):
            raise UserError(
                f"row {row} of the dataset has tool calls, which the chat template of {self._tokenizer.name_or_path} "
                "does not render: name one that does (--chat_template_path)"
            )

    def _encode(self, messages: list[Message], tools: list[Any] | None, first_learnt: int, row: int) -> Tokens:
        if self._assistant_only and self._marking is None:
            return self._by_prefixes(messages, tools, first_learnt, row)
        tokens = self._by_marks(messages, tools) if self._assistant_only else self._all(messages, tools)
        if not first_learnt:
            return tokens
        start = len(self._render(messages[:first_learnt], tools, prompt=True, template=self._marking))
        return Tokens(tokens.ids, [learnt and place >= start for place, learnt in enumerate(tokens.learnt)])

    def _all(self, messages: list[Message], tools: list[Any] | None) -> Tokens:
        ids = self._render(messages, tools)
        return Tokens(ids, [True] * len(ids))

    def _by_marks(self, messages: list[Message], tools: list[Any] | None) -> Tokens:
        marks = {"chat_template": self._marking, "return_assistant_tokens_mask": True}
        rendered = self._apply(messages, tools, **marks)
        return Tokens(list(rendered["input_ids"]), [bool(mark) for mark in rendered["assistant_masks"]])

    def _by_prefixes(self, messages: list[Message], tools: list[Any] | None, first_learnt: int, row: int) -> Tokens:
        whole = self._render(messages, tools)
        learnt = [False] * len(whole)
        for number in range(first_learnt, len(messages)):
            if messages[number]["role"] != "assistant":
                continue
            before = self._render(messages[:number], tools, prompt=True)
            until = self._render(messages[: number + 1], tools)
            end = self._end_of_turn(until, len(before))
            if whole[: len(before)] != before or whole[:end] != until[:end] or len(before) >= end:
                raise UserError(_no_prefix(row, number))
            learnt[len(before) : end] = [True] * (end - len(before))
        return Tokens(whole, learnt)

    def _end_of_turn(self, until: Sequence[int], start: int) -> int:
        """Behind the last special token of the turn; behind all of it if there is none."""
        ends = [place + 1 for place in range(start, len(until)) if until[place] in self._end_ids]
        return ends[-1] if ends else len(until)

    def _render(
        self, messages: list[Message], tools: list[Any] | None, *, prompt: bool = False, template: str | None = None
    ) -> list[int]:
        options = {"chat_template": template, "add_generation_prompt": prompt}
        return list(self._apply(messages, tools, **options)["input_ids"])

    def _apply(self, messages: list[Message], tools: list[Any] | None, **options: Any) -> Any:
        try:
            return self._tokenizer.apply_chat_template(
                messages, tools=tools, tokenize=True, return_dict=True, **options
            )
        except Exception as error:  # whatever the code of a template does
            raise _TemplateFault(f"{type(error).__name__}: {one_line(error)}") from error


class _TemplateFault(Exception):  # noqa: N818
    """A template does not take a conversation, or is wrong."""


def marking_template(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """A template that marks what the assistant says: the tokenizer's own, or TRL's for its family; else None."""
    own = tokenizer.chat_template
    own = own["default"] if isinstance(own, dict) else own
    if not tokenizer.is_fast:  # marks are found by the characters of tokens
        return None
    if has_generation_markers(own):
        return own
    try:
        return get_training_chat_template(tokenizer)
    except Exception:  # TRL renders examples of its own to find out, which a template may refuse in any way
        return None


def special_ids(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Tokens that stand for no text: those that end a text or a turn are among them."""
    added = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    return added | set(tokenizer.all_special_ids)


def _no_prefix(row: int, number: int) -> str:
    return (
        f"row {row} of the dataset: the chat template does not tell what the assistant says in message {number}, as it "
        "renders earlier turns otherwise when the conversation goes on: name a template with generation marks "
        "(--chat_template_path), learn all tokens (--assistant_only_loss false), or end the conversation there"
    )
