"""Rows as tokens and labels, and what is said of them at the start."""

from __future__ import annotations

import gc
import json
import os
import signal
from itertools import compress
from typing import Any

import pytest
from datasets import Dataset
from datasets.fingerprint import Hasher
from transformers import PreTrainedTokenizerFast

from agsel.data.formats import FEATURES
from agsel.data.tokens import (
    NOT_LEARNT,
    TOKEN_FEATURES,
    Encoder,
    Learning,
    TokenReport,
    added_tokens,
    encode_open,
    first_conversation,
    has_conversations,
    tokenise,
)
from agsel.errors import UserError
from tests.data.tokenizers import CHATML, MARKED, of_bytes, with_added

SPECIAL = ("<s>", "<|im_start|>", "<|im_end|>", "</s>")
TALK = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
DEFAULT = Learning()
ALL = Learning(completions_only=False, assistant_only=False)


def row(number: int, **given: Any) -> dict[str, Any]:
    return dict.fromkeys(FEATURES) | given | {"agsel_row": number}


def text(number: int, prompt: str, completion: str) -> dict[str, Any]:
    return row(number, prompt=prompt, completion=completion)


def talk(number: int, messages: list[dict[str, Any]] = TALK, **more: Any) -> dict[str, Any]:
    return row(number, messages=json.dumps(messages), first_learnt=0, **more)


def rows_of(*rows: dict[str, Any]) -> Dataset:
    return Dataset.from_list(list(rows), features=FEATURES)


def learnt(tokenizer: Any, given: dict[str, Any], learning: Learning = DEFAULT) -> str:
    made = Encoder(tokenizer, learning).labelled(given)
    assert all(label in (NOT_LEARNT, token) for label, token in zip(made["labels"], made["input_ids"], strict=True))
    return tokenizer.decode([label for label in made["labels"] if label != NOT_LEARNT])


@pytest.mark.parametrize(
    ("prompt", "completion", "merges", "expected"),
    [
        ("a ", "b", (), "b</s>"),
        ("a", " b", (), " b</s>"),
        ("", "b", (), "b</s>"),
        ("a", "b</s>", (), "b</s>"),
        ("a", "b</s> ", (), "b</s> </s>"),
        ("a ", "hello", (" hello",), " hello</s>"),
        ("é", "😀", (), "😀</s>"),
    ],
)
def test_of_a_text_the_completion_is_learnt_and_where_it_ends(
    prompt: str, completion: str, merges: tuple[str, ...], expected: str
) -> None:
    tokenizer = of_bytes(None, *SPECIAL, merges=merges)
    given = text(3, prompt, completion)
    assert learnt(tokenizer, given) == expected
    whole = prompt + completion + ("" if completion.endswith("</s>") else "</s>")
    assert learnt(tokenizer, given, ALL) == whole
    made = Encoder(tokenizer, Learning()).labelled(given)
    assert (tokenizer.decode(made["input_ids"]), made["agsel_row"], made["agsel_ended"]) == (whole, 3, True)


def test_a_token_that_begins_every_text_is_there_once_and_not_learnt() -> None:
    tokenizer = with_added(of_bytes(MARKED, *SPECIAL, bos_token="<s>"), "<s>")
    assert learnt(tokenizer, text(0, "", "b")) == "b</s>"
    assert Encoder(tokenizer, Learning()).encode(text(0, "", "b")).ids[0] == tokenizer.bos_token_id
    assert tokenizer.bos_token_id not in Encoder(tokenizer, Learning()).encode(talk(0)).ids


@pytest.mark.parametrize("before", ["", "<s>"])
def test_of_a_tokenizer_that_ends_every_text_the_end_is_there_once_and_no_prompt_ends(before: str) -> None:
    plain = of_bytes(None, *SPECIAL)
    ending = with_added(of_bytes(None, *SPECIAL), before, "</s>")
    added = plain.convert_tokens_to_ids([before] if before else [])
    for completion in ("b", "b</s>"):
        made, expected = (Encoder(one, Learning()).encode(text(0, "a", completion)) for one in (ending, plain))
        assert made.ids == added + expected.ids
        assert made.learnt == [False] * len(added) + expected.learnt
    assert encode_open(ending, "a") == added + encode_open(plain, "a")
    assert added_tokens(ending) == (added, [plain.eos_token_id])


def test_instructions_are_a_chat_where_the_tokenizer_has_a_template() -> None:
    both = talk(0, prompt="a\n", completion="b")
    assert learnt(of_bytes(MARKED, *SPECIAL), both) == "b<|im_end|>"
    assert learnt(of_bytes(None, *SPECIAL), both) == "b</s>"


def test_of_a_completion_of_messages_only_its_own_answers_are_learnt() -> None:
    given = talk(0, TALK * 2) | {"first_learnt": 2}
    for template in (MARKED, CHATML):
        tokenizer = of_bytes(template, *SPECIAL)
        assert learnt(tokenizer, given) == "b<|im_end|>"
        assert learnt(tokenizer, given, Learning(completions_only=False)) == "b<|im_end|>b<|im_end|>"


def test_tools_are_told_to_the_template() -> None:
    tokenizer = of_bytes("{% for tool in tools or [] %}{{ tool.name }}{% endfor %}" + CHATML, *SPECIAL)
    given = talk(0, tools=json.dumps([{"name": "weather"}]))
    assert tokenizer.decode(Encoder(tokenizer, Learning()).encode(given).ids).startswith("weather<|im_start|>user")
    assert learnt(tokenizer, given) == "b<|im_end|>"


@pytest.mark.parametrize("processes", [None, 2])
def test_all_rows_are_tokenised_in_order(processes: int | None) -> None:
    tokenizer = of_bytes(MARKED, *SPECIAL)
    rows = rows_of(text(0, "a", "b"), talk(1), text(2, "", "c" * 50))
    made = tokenise(rows, tokenizer, Learning(), processes)
    assert made.features == TOKEN_FEATURES
    assert made.to_list() == [Encoder(tokenizer, Learning()).labelled(one) for one in rows]
    other = tokenise(rows, tokenizer, ALL, processes)
    assert other["labels"][:] == other["input_ids"][:], "and are made anew for another choice"


class EndsWhoeverFinalizesIt:
    """As a group of processes hangs or crashes in a process that was forked off, which has none of its threads."""

    def __init__(self) -> None:
        self.itself = self
        self.home = os.getpid()

    def __del__(self) -> None:
        if os.getpid() != self.home:
            os._exit(1)


class Collecting(PreTrainedTokenizerFast):
    """That has the garbage collected."""

    def __call__(self, *texts: Any, **options: Any) -> Any:
        gc.collect()
        return super().__call__(*texts, **options)


def test_garbage_is_left_to_the_process_that_made_it() -> None:
    tokenizer = of_bytes(None, *SPECIAL)
    tokenizer.__class__ = Collecting
    EndsWhoeverFinalizesIt()
    made = tokenise(rows_of(text(0, "a", "b"), text(1, "a", "c")), tokenizer, DEFAULT, 2)
    assert made["agsel_row"][:] == [0, 1]
    assert gc.get_freeze_count() == 0


class Dying(PreTrainedTokenizerFast):
    """As for want of memory."""

    def __call__(self, *texts: Any, **options: Any) -> Any:
        os.kill(os.getpid(), signal.SIGKILL)


def test_a_process_that_dies_is_told() -> None:
    tokenizer = of_bytes(None, *SPECIAL)
    tokenizer.__class__ = Dying
    rows = rows_of(text(0, "a", "b"), text(1, "a", "c"))
    with pytest.raises(UserError, match=r"a process that tokenises has died.*--dataset_num_proc"):
        tokenise(rows, tokenizer, DEFAULT, 2)
    assert gc.get_freeze_count() == 0


def test_tokens_are_made_anew_when_the_rules_have_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    """`datasets` finds what it has made by a hash of what makes it."""
    tokenizer = of_bytes(MARKED, *SPECIAL)
    before = [Hasher.hash(Encoder(tokenizer, Learning()).labelled) for _ in range(2)]
    monkeypatch.setattr("agsel.data.tokens.rules", lambda: "other")
    assert before[0] == before[1] != Hasher.hash(Encoder(tokenizer, Learning()).labelled)


def report(longest_kept: int | None, *rows: dict[str, Any], template: str = MARKED) -> TokenReport:
    return TokenReport.of(tokenise(rows_of(*rows), of_bytes(template, *SPECIAL), Learning(), None), longest_kept)


def test_what_is_cut_and_what_is_learnt_is_counted() -> None:
    """12 tokens of which 2, and 22 of which 21, are learnt; the end tokens of cut rows are lost."""
    rows = (text(0, "a" * 10, "b"), text(1, "a", "b" * 20))
    assert report(None, *rows) == TokenReport(2, 34, 23, 22, None, 0, 0)
    assert report(22, *rows).cut == 0
    short = report(12, *rows)
    assert (short.cut, short.endless) == (1, 0)
    said = "17 a row, 22 at most; 68% learnt"
    assert report(None, *rows).describe(loses_end=True) == said
    assert short.describe(loses_end=True) == f"{said}; 1 of 2 rows cut at --max_length 12, without their end token"
    assert short.describe(loses_end=False) == f"{said}; 1 of 2 rows cut at --max_length 12, without their beginning"
    assert report(1, *rows).cut == 2


def test_rows_that_never_learn_to_end_are_counted() -> None:
    """A template that writes no token behind the last answer."""
    open_end = CHATML.replace("<|im_end|>", "{% if message.role == 'user' %}<|im_end|>{% endif %}")
    rows = (text(0, "a", "b"), talk(1), talk(2))
    made = report(None, *rows, template=open_end)
    assert made.endless == 2
    assert report(1, *rows, template=open_end).endless == 0, "those that are cut are counted as such"
    assert made.describe(loses_end=True).endswith("% learnt; 2 of 3 rows without a learnt end token")
    spaced = CHATML.replace("<|im_end|>", "<|im_end|> \n")
    assert report(None, talk(0), template=spaced).endless == 0


@pytest.mark.parametrize(
    ("kinds", "learning", "expected"),
    [
        ("text", Learning(), "on completions"),
        ("talk", Learning(), "on assistant messages"),
        ("both", Learning(), "on completions and on assistant messages"),
        ("both", Learning(completions_only=False), "on assistant messages"),
        ("text", Learning(completions_only=False), "on all tokens"),
        ("talk", Learning(assistant_only=False), "on all tokens"),
    ],
)
def test_what_is_learnt_in_a_few_words(kinds: str, learning: Learning, expected: str) -> None:
    rows = [text(0, "a", "b"), talk(1)]
    chosen = {"text": [True, False], "talk": [False, True], "both": [True, True]}[kinds]
    assert learning.describe(rows_of(*compress(rows, chosen))) == expected


def test_the_first_conversation_is_one_of_the_rows_that_were_drawn() -> None:
    rows = rows_of(talk(0), *(text(number, "a", "b") for number in range(1, 6)), talk(6))
    assert first_conversation(rows) == 0
    assert first_conversation(rows.select([2, 4, 6])) == 2
    assert not has_conversations(rows.select([2, 5, 4]))
