"""Conversations as tokens, and which of them are learnt: what the assistant says, and nothing else.

A chat template that marks the assistant's words with `{% generation %}` tells itself. For many others TRL has one that
renders the same and does. For all the rest the conversation is rendered again and again, up to each turn: what comes
after the prompt for an answer, through the token that ends the turn, is the answer.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template
from trl.chat_template_utils import get_training_chat_template, has_generation_markers
from trl.data_utils import common_prefix_length

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
        self._endings = Endings(tokenizer)

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
        with self._complaints(row):
            self._require_rendered(messages, tools, row)
            tokens = self._encode(list(messages), tools, first_learnt, row)
        if not any(tokens.learnt):
            raise UserError(
                f"row {row} of the dataset has nothing to learn: the chat template of {self._tokenizer.name_or_path} "
                "marks nothing of what the assistant says; name another (--chat_template_path)"
            )
        return tokens

    def prompt(self, messages: Sequence[Message], tools: list[Any] | None, number: int, row: int) -> str:
        """What a model is given to say a message.

        Args:
            messages: the conversation.
            tools: that the assistant may call.
            number: of the message.
            row: for error messages.

        Raises:
            UserError: the template does not take the conversation, or does not tell.
        """
        with self._complaints(row):
            prompt = self._prompt(list(messages), tools, number)
        if prompt is None:
            raise UserError(_no_prefix(row, number))
        return prompt

    @contextmanager
    def _complaints(self, row: int) -> Iterator[None]:
        try:
            yield
        except _TemplateFault as error:
            raise UserError(
                f"the chat template of {self._tokenizer.name_or_path} fails on row {row} of the dataset, {error}; "
                "correct the row or the template, or name another (--chat_template_path)"
            ) from error

    def _require_rendered(self, messages: Sequence[Message], tools: list[Any] | None, row: int) -> None:
        """Many templates say nothing of tool calls, and some of text: a turn would be learnt as if there were none."""
        rendered = self._text(messages, tools)
        for what, change in {"tool calls": _with_other_calls, "words of the assistant": _with_other_words}.items():
            other = [change(message) for message in messages]
            if other != messages and self._text(other, tools) == rendered:
                raise UserError(
                    f"row {row} of the dataset has {what}, which the chat template of {self._tokenizer.name_or_path} "
                    "does not render: name one that does (--chat_template_path)"
                )

    def _encode(self, messages: list[Message], tools: list[Any] | None, first_learnt: int, row: int) -> Tokens:
        if self._assistant_only and self._marking is None:
            return self._by_prefixes(messages, tools, first_learnt, row)
        tokens = self._by_marks(messages, tools) if self._assistant_only else self._all(messages, tools)
        if not first_learnt:
            return tokens
        start = self._start_of_turn(messages, tools, first_learnt, tokens.ids)
        if start is None:
            raise UserError(_no_prefix(row, first_learnt))
        return Tokens(tokens.ids, [learnt and place >= start for place, learnt in enumerate(tokens.learnt)])

    def _all(self, messages: list[Message], tools: list[Any] | None) -> Tokens:
        ids = self._render(messages, tools)
        return Tokens(ids, [True] * len(ids))

    def _by_marks(self, messages: list[Message], tools: list[Any] | None) -> Tokens:
        """Tokens that begin or end between marks, and those between these, which may be spaces without a place."""
        rendered, spans = self._marked_text(messages, tools)
        encoded = self._tokenizer(rendered, add_special_tokens=False, return_offsets_mapping=True)
        beginnings, ends = zip(*encoded["offset_mapping"], strict=True)
        learnt = [False] * len(ends)
        for begin, end in spans:
            if begin < end:
                tokens = range(bisect_right(ends, begin), bisect_left(beginnings, end))
                learnt[tokens.start : tokens.stop] = [True] * len(tokens)
        return Tokens(list(encoded["input_ids"]), learnt)

    def _by_prefixes(self, messages: list[Message], tools: list[Any] | None, first_learnt: int, row: int) -> Tokens:
        whole = self._render(messages, tools)
        learnt = [False] * len(whole)
        for number in range(first_learnt, len(messages)):
            if messages[number]["role"] != "assistant":
                continue
            start = self._start_of_turn(messages, tools, number, whole)
            until = self._render(messages[: number + 1], tools)
            end = self._endings.behind(until, start or 0) or len(until)
            if start is None or whole[:end] != until[:end] or start >= end:
                raise UserError(_no_prefix(row, number))
            learnt[start:end] = [True] * (end - start)
        return Tokens(whole, learnt)

    def _start_of_turn(
        self, messages: list[Message], tools: list[Any] | None, number: int, whole: list[int]
    ) -> int | None:
        """Number of the first token behind the prompt for a message; None if the whole does not begin with one.

        The last token of the prompt may go on in the message, and is another one there.
        """
        prompt = self._prompt(messages, tools, number)
        if prompt is None:
            return None
        before = self._tokens(prompt)
        if whole[: len(before)] == before:
            return len(before)
        return common_prefix_length(before, whole) if self._text(messages, tools).startswith(prompt) else None

    def _prompt(self, messages: list[Message], tools: list[Any] | None, number: int) -> str | None:
        """What stands before a message. Templates do not render nothing, so for the first one it is cut off."""
        if number:
            return self._text(messages[:number], tools, prompt=messages[number]["role"] == "assistant")
        prompt = self._text(messages[:1], tools, prompt=True)
        begun = self._text(messages[:1], tools)
        asked = prompt.removeprefix(begun)
        return begun[: begun.index(asked) + len(asked)] if asked and asked in begun else None

    def _render(self, messages: list[Message], tools: list[Any] | None) -> list[int]:
        return self._tokens(self._text(messages, tools))

    def _tokens(self, text: str) -> list[int]:
        return list(self._tokenizer(text, add_special_tokens=False)["input_ids"])

    def _text(self, messages: Sequence[Message], tools: list[Any] | None, *, prompt: bool = False) -> str:
        with _faults_of_templates():
            return self._tokenizer.apply_chat_template(
                list(messages),
                tools=tools,
                chat_template=self._marking,
                add_generation_prompt=prompt,
                tokenize=False,
            )

    def _marked_text(self, messages: list[Message], tools: list[Any] | None) -> tuple[str, list[tuple[int, int]]]:
        """(text, where in it marked parts begin and end)"""
        with _faults_of_templates():
            (rendered,), (spans,) = render_jinja_template(
                [messages],
                tools=tools,
                chat_template=self._marking,
                return_assistant_tokens_mask=True,
                **self._tokenizer.special_tokens_map,
            )
        return rendered, spans


class Endings:
    """Finds the tokens that end a text or a turn.

    Args:
        tokenizer: of the model.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._special = special_ids(tokenizer)

    def behind(self, ids: Sequence[int], start: int) -> int | None:
        """The place behind the last special token from `start` on, if nothing but space follows it."""
        for place in range(len(ids) - 1, start - 1, -1):
            if ids[place] in self._special:
                return place + 1
            if self._tokenizer.decode([ids[place]]).strip():
                return None
        return None


class _TemplateFault(Exception):  # noqa: N818
    """A template does not take a conversation, or is wrong."""


@contextmanager
def _faults_of_templates() -> Iterator[None]:
    try:
        yield
    except Exception as error:  # whatever the code of a template does
        raise _TemplateFault(f"{type(error).__name__}: {one_line(error)}") from error


def _with_other_calls(message: Message) -> Message:
    calls = message.get("tool_calls")
    return message | {"tool_calls": [_renamed(call) for call in calls]} if calls else message


def _renamed(call: dict[str, Any]) -> dict[str, Any]:
    if isinstance(call.get("function"), dict):
        return call | {"function": _renamed(call["function"])}
    return call | {"name": f"{call.get('name')}_"}


def _with_other_words(message: Message) -> Message:
    spoken = message["role"] == "assistant" and message["content"].strip()
    return message | {"content": f"{message['content']}."} if spoken else message


def marking_template(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """A template that marks what the assistant says: the tokenizer's own, or TRL's for its family; else None."""
    own = tokenizer.chat_template
    own = own.get("default") if isinstance(own, dict) else own
    if own is None or not tokenizer.is_fast:  # marks are found by the characters of tokens
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
        f"row {row} of the dataset: the chat template does not tell what the assistant says in message {number}, as "
        "its prompt for an answer, or an earlier turn, is another one when the conversation goes on: name a template "
        "with generation marks (--chat_template_path), learn all tokens (--assistant_only_loss false), or end the "
        "conversation there"
    )
