"""What a dataset is by its columns, what becomes of each row, and every refusal with the row or column it is about."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow.compute as pc
import pytest
from datasets import Dataset, Features, Value

from agsel.data.fields import Fields, unescape, with_line_breaks
from agsel.data.formats import FEATURES, first_row, join, read_rows
from agsel.data.sources import Source
from agsel.errors import UserError

Rows = list[dict[str, Any]]
Write = Callable[[Path, Rows], Path]


def as_lines(folder: Path, rows: Rows) -> Path:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def as_parquet(folder: Path, rows: Rows) -> Path:
    path = folder / "rows.parquet"
    Dataset.from_list(rows).to_parquet(path)
    return path


def read(path: Path, **fields: str) -> Rows:
    return read_rows(Source(str(path)), Fields(**fields))[0].to_list()


def texts(path: Path, **fields: str) -> list[tuple[str, str]]:
    return [(row["prompt"], row["completion"]) for row in read(path, **fields)]


def meaning(row: dict[str, Any]) -> Any:
    """A text as (prompt, completion); a conversation as (turns, tools, number of the first that may be learnt)."""
    if row["messages"] is None:
        return row["prompt"], row["completion"]
    tools = json.loads(row["tools"]) if row["tools"] else None
    return json.loads(row["messages"]), tools, row["first_learnt"]


def turn(role: Any, content: Any, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


def part(text: str) -> dict[str, str]:
    return {"type": "text", "text": text}


def from_value(*turns: tuple[str, str]) -> Rows:
    return [{"from": who, "value": what} for who, what in turns]


TALK = [turn("user", "a"), turn("assistant", "b")]
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"city": {"type": "string"}}}}]
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Bonn"}}}
CALLED = [
    turn("user", "weather?"),
    turn("assistant", None, tool_calls=[CALL]),
    turn("tool", "12", name="weather"),
    turn("assistant", "12 degrees"),
]
CALLED_READ = [CALLED[0], turn("assistant", "", tool_calls=[CALL]), *CALLED[2:]]
WRITTEN_CALL = {"type": "function", "function": {"name": "weather", "arguments": '{"city": "Bonn"}'}}
BRIEF = from_value(("system", "Be brief."), ("human", "2+2?"), ("gpt", "4"))
BRIEF_READ = [turn("system", "Be brief."), turn("user", "2+2?"), turn("assistant", "4")]
TEXT = {"prompt": "a", "completion": " b"}

FORMATS: dict[str, tuple[dict[str, Any], str, Any]] = {
    "text": (TEXT, "prompt and completion (prompt, completion), 1 rows", ("a", " b")),
    "text beside": (TEXT | {"text": "z"}, "(prompt, completion), 1 rows; dropped: text", ("a", " b")),
    "input_ids beside": (TEXT | {"input_ids": [70, 71]}, "; dropped: input_ids", ("a", " b")),
    "labels beside": (TEXT | {"labels": [10, 20]}, "; dropped: labels", ("a", " b")),
    "own names beside": (
        TEXT | {"agsel_row": 7, "first_learnt": "x"},
        "; dropped: agsel_row, first_learnt",
        ("a", " b"),
    ),
    "messages": ({"messages": TALK}, "messages (messages), 1 rows", (TALK, None, 0)),
    "prompt beside messages": (
        {"prompt": "x", "prompt_id": "y", "messages": TALK},
        "messages (messages), 1 rows; dropped: prompt, prompt_id",
        (TALK, None, 0),
    ),
    "prompt, completion and messages": (
        TEXT | {"messages": TALK},
        "prompt and completion (prompt, completion), 1 rows; dropped: messages",
        ("a", " b"),
    ),
    "both of messages": (
        {"prompt": TALK[:1], "completion": TALK[1:], "tools": TOOLS},
        "prompt and completion of messages (prompt, completion, tools)",
        (TALK, TOOLS, 1),
    ),
    "tool calls": ({"messages": CALLED, "tools": TOOLS}, "messages (messages, tools)", (CALLED_READ, TOOLS, 0)),
    "tools as text": (
        {"messages": [CALLED[0], turn("assistant", "", tool_calls=[WRITTEN_CALL])], "tools": json.dumps(TOOLS)},
        "messages (messages, tools)",
        (CALLED_READ[:2], TOOLS, 0),
    ),
    "no tools": ({"messages": TALK, "tools": ""}, "messages (messages, tools)", (TALK, None, 0)),
    "ShareGPT": ({"conversations": BRIEF}, "ShareGPT conversations (conversations)", (BRIEF_READ, None, 0)),
    "ShareGPT as text": ({"conversations": json.dumps(BRIEF)}, "ShareGPT conv", (BRIEF_READ, None, 0)),
    "ShareGPT in messages": ({"messages": BRIEF}, "ShareGPT conversations (messages)", (BRIEF_READ, None, 0)),
    "messages in conversations": ({"conversations": TALK}, "messages (conversations)", (TALK, None, 0)),
    "parts of text": (
        {"messages": [turn("user", [part("a"), part("c")]), turn("assistant", [part("b")])]},
        "messages (messages)",
        ([turn("user", "ac"), turn("assistant", "b")], None, 0),
    ),
    "thinking": (
        {"messages": [TALK[0], turn("assistant", "b", reasoning_content="hm", rating=None)]},
        "messages (messages)",
        ([TALK[0], turn("assistant", "b", reasoning_content="hm")], None, 0),
    ),
    "empty system turn": (
        {"messages": [turn("system", ""), *TALK]},
        "messages (messages)",
        ([turn("system", ""), *TALK], None, 0),
    ),
}


@pytest.mark.parametrize("write", [as_lines, as_parquet])
@pytest.mark.parametrize("name", FORMATS)
def test_the_columns_decide_what_a_dataset_is(tmp_path: Path, name: str, write: Write) -> None:
    row, said, expected = FORMATS[name]
    path = write(tmp_path, [row])
    rows, line = read_rows(Source(str(path)), Fields())
    assert line.startswith(f"{path} [train]: ")
    assert said in line
    assert meaning(rows[0]) == expected
    assert rows.features == FEATURES


@pytest.mark.parametrize("write", [as_lines, as_parquet])
def test_instructions_are_a_conversation_and_text_for_a_tokenizer_without_template(
    tmp_path: Path, write: Write
) -> None:
    asked = ["Add the numbers.", "Say hello."]
    rows = [
        {"instruction": asked[0], "input": "2 and 2", "output": "4", "system": "s"},
        {"instruction": asked[1], "input": "", "output": "Hello.", "system": "s"},
        {"instruction": asked[1], "input": None, "output": "Hello.", "system": "s"},
    ]
    made, said = read_rows(Source(str(write(tmp_path, rows))), Fields())
    assert "Alpaca instructions (instruction, input, output), 3 rows; dropped: system" in said
    assert [row["prompt"] for row in made] == ["Add the numbers.\n\n2 and 2\n", "Say hello.\n", "Say hello.\n"]
    assert made["completion"][:] == ["4", "Hello.", "Hello."]
    turns = [turn("user", "Add the numbers.\n\n2 and 2"), turn("assistant", "4")]
    assert meaning(made[0]) == (turns, None, 0)
    del rows[0]["input"], rows[1]["input"], rows[2]["input"]
    assert "Alpaca instructions (instruction, output)" in read_rows(Source(str(write(tmp_path, rows))), Fields())[1]


def test_what_only_late_rows_have_is_read_too(tmp_path: Path) -> None:
    """The columns of a text file are those of its first 1000 rows."""
    talks = [{"messages": TALK}] * 1000 + [{"messages": TALK, "tools": TOOLS}]
    assert meaning(read(as_lines(tmp_path, talks))[1000]) == (TALK, TOOLS, 0)
    told = [{"instruction": "a", "output": "b"}] * 1000 + [{"instruction": "a", "input": "c", "output": "b"}]
    assert texts(as_lines(tmp_path, told))[999:] == [("a\n", "b"), ("a\n\nc\n", "b")]
    wanted = Source(str(as_lines(tmp_path, talks)), columns=("messages",))
    assert meaning(read_rows(wanted, Fields())[0][1000]) == (TALK, None, 0)


REFUSED_COLUMNS: dict[str, tuple[dict[str, Any], str]] = {
    "text": ({"text": "a"}, "has a column text and no prompt: say which part is learnt, for example by --prompt_temp"),
    "others": (
        {"question": "a", "answer": "b"},
        "columns question, answer: say which are prompt and completion (--pro",
    ),
    "prompt": ({"prompt": "a", "answer": "b"}, "has the columns prompt, answer: say which are prompt and completion"),
}


@pytest.mark.parametrize("name", REFUSED_COLUMNS)
def test_columns_of_no_known_format_are_refused(tmp_path: Path, name: str) -> None:
    row, words = REFUSED_COLUMNS[name]
    refuse(as_lines(tmp_path, [row]), "(--dataset_name)", words)


def refuse(path: Path, *words: str, **fields: str) -> None:
    with pytest.raises(UserError) as refusal:
        read(path, **fields)
    for part in words:
        assert part in str(refusal.value)
    assert "\n" not in str(refusal.value)


def talk(*turns: Any) -> dict[str, Any]:
    return {"messages": list(turns)}


REFUSED_ROWS: dict[str, tuple[Rows, str]] = {
    "number among texts": (
        [TEXT, {"prompt": "x", "completion": 5}],
        "row 1 of the dataset, column completion: holds a number (5), not text; --completion_field completion makes",
    ),
    "list among texts": (
        [TEXT, {"prompt": "x", "completion": ["y"]}],
        "row 1 of the dataset, column completion: holds a list, not text",
    ),
    "truth value": ([{"prompt": True, "completion": "y"}], "column prompt: holds a truth value (true), not text"),
    "object": ([{"prompt": {"a": "b"}, "completion": "y"}], "column prompt: holds an object, not text"),
    "null prompt": ([TEXT, {"prompt": None, "completion": " y"}], "row 1 of the dataset, column prompt: holds null"),
    "no completion": ([TEXT, {"prompt": "x"}], "row 1 of the dataset, column completion: holds null, not text"),
    "blank completion": (
        [TEXT, TEXT, {"prompt": "x", "completion": " \n"}],
        "row 2 of the dataset has nothing to learn: its completion is empty",
    ),
    "list prompt": (
        [{"prompt": TALK[:1], "completion": " b"}],
        "row 0 of the dataset, column prompt: holds a list, not text",
    ),
    "text prompt": (
        [{"prompt": "a", "completion": TALK[1:]}],
        "row 0 of the dataset, column prompt: holds text, not a list of messages with role and content",
    ),
    "text for messages": (
        [{"prompt": TALK[:1], "completion": TALK[1:]}, {"prompt": TALK[:1], "completion": "b"}],
        "row 1 of the dataset, column completion: holds text, not a list of messages",
    ),
    "completion of a user": (
        [{"prompt": TALK[:1], "completion": TALK[:1]}],
        "row 0 of the dataset, column completion: has nothing to learn: no message of the assistant has text",
    ),
    "mixed dialects": (
        [talk(*TALK), {"messages": BRIEF}],
        "row 1 of the dataset, column messages: message 0 has no role, it has from, value: role and content are needed",
    ),
    "null message": (
        [talk(TALK[0], None, TALK[1])],
        "row 0 of the dataset, column messages: message 1 is null, not one with role and content",
    ),
    "text message": ([talk("a", TALK[1])], "message 0 is text, not one with role and content"),
    "null messages": ([talk(*TALK), {"messages": None}], "row 1 of the dataset, column messages: is null: give it a"),
    "no messages": ([talk(*TALK), talk()], "row 1 of the dataset, column messages: holds no messages"),
    "one message": ([{"messages": TALK[0]}], "column messages: holds an object, not a list of messages"),
    "messages as broken text": ([{"messages": '[{"role": '}], "column messages: holds text that is no JSON (Expecting"),
    "messages nested deeply": ([{"messages": "[" * 100_000}], "column messages: holds text that is no JSON (maximum"),
    "no assistant": (
        [talk(*TALK), talk(*TALK), talk(TALK[0])],
        "row 2 of the dataset, column messages: has nothing to learn: no message of the assistant has text or tool",
    ),
    "silent assistant": ([talk(TALK[0], turn("assistant", " "))], "row 0 of the dataset, column messages: has nothing"),
    "unknown role": (
        [talk(*TALK, turn("bot", "c"))],
        "message 2 has the unknown role 'bot': known are system, developer",
    ),
    "capital role": ([talk(turn("User", "a"), TALK[1])], "message 0 has the unknown role 'User': known are system"),
    "null role": ([talk(turn(None, "a"), TALK[1])], "message 0 has no role, it has content"),
    "list role": ([talk(turn(["user"], "a"), TALK[1])], "message 0 has the unknown role ['user']"),
    "null content": ([talk(turn("user", None), TALK[1])], "the content of message 0 is null, not text"),
    "number content": ([talk(turn("user", 5), TALK[1])], "the content of message 0 is a number (5), not text"),
    "image": ([talk(turn("user", [{"type": "image"}]), TALK[1])], "message 0 has a part that is no text"),
    "name": ([talk(turn("user", "a", name=5), TALK[1])], "the name of message 0 is a number (5), not text"),
    "text calls": ([talk(turn("assistant", "", tool_calls="f()"))], "the tool_calls of message 0 are text, not a list"),
    "null call": (
        [talk(turn("assistant", "", tool_calls=[None]))],
        "the tool_calls of message 0 are a list, not a list",
    ),
    "one tool": (
        [talk(*TALK) | {"tools": TOOLS[0]}],
        "row 0 of the dataset, column tools: holds an object, not a list",
    ),
    "broken tools": ([talk(*TALK) | {"tools": "[{"}], "row 0 of the dataset, column tools: holds text that is no JSON"),
    "unknown speaker": (
        [{"conversations": from_value(("human", "a"), ("bing", "b"))}],
        "row 0 of the dataset, column conversations: message 1 is from the unknown role 'bing': known are system,",
    ),
    "number speaker": (
        [{"conversations": [*BRIEF, {"from": 5, "value": "b"}]}],
        "message 3 is from the unknown role 5: known are",
    ),
    "no value": ([{"conversations": [*BRIEF, {"from": "gpt"}]}], "the content of message 3 is null, not text"),
    "null output": (
        [{"instruction": "a", "output": None}],
        "row 0 of the dataset, column output: holds null, not text",
    ),
    "number input": (
        [{"instruction": "a", "input": 5, "output": "b"}],
        "row 0 of the dataset, column input: holds a number (5), not text",
    ),
    "blank output": ([{"instruction": "a", "output": ""}], "row 0 of the dataset has nothing to learn: its output is"),
    "half a character": ([TEXT, {"prompt": "\ud83d", "completion": "y"}], r"row 1 of the dataset holds half of a char"),
    "half a character in a tool": (
        [talk(*CALLED) | {"tools": [{"name": "\udc00"}]}],
        r"row 0 of the dataset holds half",
    ),
}
TYPED = (
    "null prompt",
    "no completion",
    "blank completion",
    "list prompt",
    "null messages",
    "no messages",
    "unknown role",
)


@pytest.mark.parametrize("name", REFUSED_ROWS)
def test_a_row_that_cannot_be_learnt_is_refused_with_its_number_and_column(tmp_path: Path, name: str) -> None:
    rows, words = REFUSED_ROWS[name]
    refuse(as_lines(tmp_path, rows), words)


@pytest.mark.parametrize("name", TYPED)
def test_rows_with_types_are_refused_alike(tmp_path: Path, name: str) -> None:
    rows, words = REFUSED_ROWS[name]
    refuse(as_parquet(tmp_path, rows), words)


def test_large_texts_with_a_type_are_checked_as_whole_columns(tmp_path: Path) -> None:
    number = 25_000
    kinds = Features({"prompt": Value("large_string"), "completion": Value("string"), "id": Value("int64")})
    columns = {"prompt": ["a"] * number, "completion": ["b"] * number, "id": list(range(number))}
    path = tmp_path / "rows.parquet"
    Dataset.from_dict(columns, kinds).to_parquet(path)
    rows, said = read_rows(Source(str(path), split="train[1:]"), Fields())
    assert f"{number - 1:,} rows; dropped: id" in said
    assert rows.features == FEATURES
    assert rows[-1] == {**TEXT, "completion": "b", "messages": None, "tools": None, "first_learnt": None} | {
        "agsel_row": number - 2
    }
    columns["completion"][20_001] = "\t"
    Dataset.from_dict(columns, kinds).to_parquet(path)
    refuse(path, "row 20001 of the dataset has nothing to learn")


QUESTIONS = [
    {"question": "one and one?", "answer": "two", "level": 1, "tags": ["a", "b"], "meta": {"by": "me"}},
    {"question": "two and two?", "answer": "four", "level": None, "tags": ["c"], "meta": {"by": "you"}},
]
MAPPED = {"prompt_field": "question", "completion_field": "answer"}


def test_fields_become_prompt_and_completion_and_nothing_else_is_kept(tmp_path: Path) -> None:
    path = as_lines(tmp_path, QUESTIONS)
    assert texts(path, **MAPPED) == [("one and one?", "two"), ("two and two?", "four")]
    said = read_rows(Source(str(path)), Fields(**MAPPED))[1]
    assert said.endswith("mapped columns (question, answer), 2 rows; dropped: level, tags, meta")


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("Level {level}: {question}\nAnswer:", "Level 1: one and one?\nAnswer:"),
        ("{{{level:.2f}}}", "{1.00}"),
        ("{level:>{level}}{level!r}", "11"),
        ("{tags[1]} {tags} {meta[by]} {meta}", 'b ["a", "b"] me {"by": "me"}'),
        ("no column", "no column"),
        ("", ""),
    ],
)
def test_templates_see_every_column(tmp_path: Path, template: str, expected: str) -> None:
    path = as_lines(tmp_path, QUESTIONS[:1])
    assert texts(path, prompt_template=template, completion_field="answer") == [(expected, "two")]


def test_a_column_called_prompt_may_be_mapped(tmp_path: Path) -> None:
    for write in (as_lines, as_parquet):
        path = write(tmp_path, [{"prompt": "a", "answer": "b", "agsel_row": 7}])
        assert texts(path, prompt_template="<{prompt}>", completion_field="answer") == [("<a>", "b")]
        assert texts(path, prompt_field="prompt", completion_field="agsel_row") == [("a", "7")]


@pytest.mark.parametrize("name", ["data.question", "a:b", "a[b", "{a}", "", "ä ö"])
def test_a_column_may_have_any_name(tmp_path: Path, name: str) -> None:
    path = as_lines(tmp_path, [{name: "one?", "answer": 1}, {name: None, "answer": 2}])
    assert texts(path, prompt_field=name, completion_field="answer") == [("one?", "1"), ("", "2")]


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        (MAPPED | {"completion_field": "anwser"}, "no column 'anwser' (--completion_field): it has question, answer"),
        (MAPPED | {"completion_field": "anwser"}, "; did you mean 'answer'?"),
        (MAPPED | {"prompt_field": "Question"}, "no column 'Question' (--prompt_field)"),
        (MAPPED | {"prompt_template": "{query}"}, "no column 'query' (--prompt_template)"),
        (MAPPED | {"prompt_template": "{level:{width}}"}, "no column 'width' (--prompt_template)"),
        (MAPPED | {"prompt_template": "{}"}, "no column '' (--prompt_template)"),
        (MAPPED | {"prompt_template": "{"}, "--prompt_template '{' is no Python format string"),
        ({"prompt_field": "question"}, "the completion is not given (--completion_field): name one of the columns"),
        ({"completion_template": "{answer}"}, "the prompt is not given (--prompt_field)"),
        (
            {"prompt_template": "a", "completion_template": "b"},
            "no column is learnt: name one in --completion_template",
        ),
        (MAPPED | {"completion_field": "tags"}, "row 0 of the dataset, column tags: holds a list, not text (--complet"),
        (MAPPED | {"completion_field": "meta"}, "row 0 of the dataset, column meta: holds an object, not text"),
        (MAPPED | {"completion_field": "level"}, "row 1 of the dataset has nothing to learn: its completion is empty"),
    ],
)
def test_fields_that_do_not_fit_the_dataset_are_refused(tmp_path: Path, fields: dict[str, str], words: str) -> None:
    refuse(as_lines(tmp_path, QUESTIONS), words, **fields)


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{question.nothing}", "row 0 of the dataset, AttributeError: "),
        (
            "{question.upper}",
            "row 0 of the dataset, TypeError: question.upper is a builtin_function_or_method, not text",
        ),
        ("{question[nothing]}", "row 0 of the dataset, TypeError: "),
        ("{meta[nothing]}", "row 0 of the dataset, KeyError: "),
        ("{tags[1]}", "row 1 of the dataset, IndexError: "),
        ("{level:d}", "row 1 of the dataset, ValueError: "),
        ("{level:{question}}", "row 0 of the dataset, ValueError: "),
    ],
)
@pytest.mark.parametrize("side", ["prompt", "completion"])
def test_templates_that_do_not_fit_a_row_are_refused(tmp_path: Path, side: str, template: str, reason: str) -> None:
    fields = MAPPED | {f"{side}_template": template}
    refuse(as_lines(tmp_path, QUESTIONS), f"--{side}_template {template!r} does not fit {reason}", **fields)


def test_bytes_are_no_text(tmp_path: Path) -> None:
    path = as_parquet(tmp_path, [{"question": b"a", "answer": "b"}])
    refuse(path, "row 0 of the dataset, column question: holds bytes, not text", **MAPPED)
    template = {"prompt_template": "<{question}>", "completion_field": "answer"}
    refuse(path, "--prompt_template '<{question}>' does not fit row 0", "question is bytes", **template)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--prompt_template", r"Question: {question}\nAnswer:"], "Question: {question}\nAnswer:"),
        ([r"--completion-template=\t{answer}\\n"], "\t{answer}\\n"),
        (["--prompt_template", r"\d\r"], r"\d\r"),
    ],
)
def test_templates_on_the_command_line_may_have_line_breaks_and_tabs(words: list[str], expected: str) -> None:
    *flag, value = with_line_breaks(words)
    assert flag == words[:-1]
    assert value.removeprefix("--completion-template=") == expected


def test_other_words_of_the_command_line_stay() -> None:
    words = ["--output_dir", r"a\n", "--prompt_field", r"b\t", "--prompt_template"]
    assert with_line_breaks(words) == words
    assert unescape(r"\\n") == r"\n"


def test_joined_rows_are_numbered_through(tmp_path: Path) -> None:
    parts = [read_rows(Source(str(as_lines(tmp_path, rows))), Fields())[0] for rows in ([TEXT] * 2, [talk(*TALK)] * 3)]
    whole = join(parts)
    assert whole["agsel_row"][:] == [0, 1, 2, 3, 4]
    assert [row["messages"] is None for row in whole] == [True, True, False, False, False]
    assert join(parts[:1]) is parts[0]


def test_the_first_row_is_one_of_those_that_were_chosen(tmp_path: Path) -> None:
    """Of a dataset with an index Arrow's table still holds all rows."""
    rows = Dataset.from_dict({"number": list(range(30_000))}).select([29_999, 5, 20_000])
    found = [first_row(rows, "number", partial(pc.equal, wanted)) for wanted in (20_000, 6)]
    assert found == [2, None]
