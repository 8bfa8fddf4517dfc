"""One rule decides by its columns what a dataset is; every row is then made into text or a conversation, and checked.

Whatever the format, a row becomes the same few columns (`FEATURES`): text has `prompt` and `completion`, a conversation
`messages` and `tools` as JSON, and the number of the first message that may be learnt.
"""

from __future__ import annotations

import json
import re
import string
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, Features, Value, concatenate_datasets

from agsel.data.messages import read_messages, read_tools, require_answer
from agsel.data.sources import Row, Rows, Source, TypedRows, open_source
from agsel.data.values import as_text, is_text, kind_name
from agsel.errors import UserError, suggestion

ROW_NUMBER = "agsel_row"
FEATURES = Features(
    {
        "prompt": Value("string"),
        "completion": Value("string"),
        "messages": Value("string"),
        "tools": Value("string"),
        "first_learnt": Value("int64"),
    }
)
NO_TEXT: Row = {"prompt": None, "completion": None}
NO_MESSAGES: Row = {"messages": None, "tools": None, "first_learnt": None}


@dataclass(frozen=True)
class Fields:
    """What the user says of the columns, by `--prompt_field` and its like; None where nothing is said."""

    prompt_field: str | None = None
    completion_field: str | None = None
    prompt_template: str | None = None
    completion_template: str | None = None

    def __bool__(self) -> bool:
        return any((self.prompt_field, self.completion_field, self.prompt_template, self.completion_template))


@dataclass(frozen=True)
class Format:
    """What a dataset is.

    Attributes:
        name: for people.
        used: columns that are read.
        make: a row of `FEATURES` from a row and its number.
    """

    name: str
    used: tuple[str, ...]
    make: Callable[[Row, int], Row]


def read_rows(source: Source, fields: Fields) -> tuple[Dataset, str]:
    """The rows of a dataset in `FEATURES`, each with its number, and a line that says what they were.

    Raises:
        UserError: no such dataset, columns of no known format, or a row that cannot be learnt.
    """
    rows = open_source(source)
    form = choose_format(rows, fields, source)
    made = _take_text(rows, form) if _is_plain_text(rows, form) else rows.convert(form.make, FEATURES, "Reading rows")
    dropped = [column for column in rows.columns if column not in form.used]
    said = f"{source.name} [{source.split}]: {form.name} ({', '.join(form.used)}), {len(made):,} rows"
    said += f"; dropped: {', '.join(dropped)}" if dropped else ""
    return made.add_column(ROW_NUMBER, list(range(len(made)))), said


def join(parts: Sequence[Dataset]) -> Dataset:
    """Several datasets one after another; rows are numbered through."""
    if len(parts) == 1:
        return parts[0]
    whole = concatenate_datasets([part.remove_columns(ROW_NUMBER) for part in parts])
    return whole.add_column(ROW_NUMBER, list(range(len(whole))))


def choose_format(rows: Rows, fields: Fields, source: Source) -> Format:
    """By the columns, in this order: what the user says; prompt and completion; messages; conversations; instructions.

    Raises:
        UserError: the columns are of none of these.
    """
    columns = set(rows.columns)
    if fields:
        return _mapped(rows.columns, fields)
    if {"prompt", "completion"} <= columns:
        return _prompt_and_completion(rows.first)
    for column in ("messages", "conversations"):
        if column in columns:
            used = (column, "tools") if "tools" in columns else (column,)
            return Format(_name_of_chat(column, rows.first), used, partial(_conversation, column))
    if {"instruction", "output"} <= columns:
        read = [column for column in ("instruction", "input", "output") if column in columns]
        return Format("Alpaca instructions", tuple(read), _instruction)
    raise UserError(_no_format(rows.columns, source))


def _no_format(columns: Sequence[str], source: Source) -> str:
    if "text" in columns:
        return (
            f"{source.name} ({source.flag}) has a column text and no prompt: say which part is learnt, for example by "
            "--prompt_template '' --completion_template '{text}' for all of it"
        )
    return (
        f"{source.name} ({source.flag}) has the columns {', '.join(columns)}: say which are prompt and completion "
        "(--prompt_field, --completion_field), or bring prompt and completion, messages, conversations, or instruction "
        "and output"
    )


def _name_of_chat(column: str, first: Row) -> str:
    value = first.get(column)
    message = value[0] if isinstance(value, list) and value and isinstance(value[0], Mapping) else {}
    return "ShareGPT conversations" if message.get("from") is not None else "messages"


def _prompt_and_completion(first: Row) -> Format:
    if isinstance(first.get("completion"), list):
        used = ("prompt", "completion", "tools") if "tools" in first else ("prompt", "completion")
        return Format("prompt and completion of messages", used, _two_parts)
    return Format("prompt and completion", ("prompt", "completion"), _text)


def _text(row: Row, number: int) -> Row:
    for column in ("prompt", "completion"):
        value = row.get(column)
        if not is_text(value):
            hint = "" if value is None else f"; --{column}_field {column} makes text of any column"
            raise complaint(number, column, f"holds {kind_name(value)}, not text{hint}")
    return _checked_text(row["prompt"], row["completion"], number, "completion")


def _checked_text(prompt: str, completion: str, number: int, column: str) -> Row:
    if not completion.strip():
        raise UserError(
            f"row {number} of the dataset has nothing to learn: its {column} is empty; remove the row or correct "
            "--completion_field and --completion_template"
        )
    return {"prompt": prompt, "completion": completion, **NO_MESSAGES}


def _is_plain_text(rows: Rows, form: Format) -> bool:
    """Prompts and completions that have the type of text already can be checked as whole columns."""
    if not isinstance(rows, TypedRows) or form.make is not _text:
        return False
    return all(rows.rows.features[column] == Value("string") for column in form.used)


def _take_text(rows: Rows, form: Format) -> Dataset:
    assert isinstance(rows, TypedRows), "of _is_plain_text"
    chosen = rows.rows.select_columns(list(form.used)).flatten_indices()
    for column in form.used:
        missing = _first_true(pc.is_null(chosen.data.column(column)))
        if missing is not None:
            raise complaint(missing, column, "holds null, not text")
    blank = _first_true(pc.equal(pc.utf8_trim_whitespace(chosen.data.column("completion")), ""))
    if blank is not None:
        _checked_text("", "", blank, "completion")
    for name in NO_MESSAGES:
        chosen = chosen.add_column(name, [None] * len(chosen), feature=FEATURES[name])
    return chosen.select_columns(list(FEATURES))


def _first_true(mask: Any) -> int | None:
    found = pc.index(mask, pa.scalar(True)).as_py()
    return found if found >= 0 else None


def _conversation(column: str, row: Row, number: int) -> Row:
    def complain(what: str) -> UserError:
        return complaint(number, column, what)

    messages = read_messages(row.get(column), complain)
    require_answer(messages, complain)
    return _chat(messages, _tools(row, number), 0)


def _tools(row: Row, number: int) -> list[Any] | None:
    return read_tools(row.get("tools"), partial(complaint, number, "tools"))


def _two_parts(row: Row, number: int) -> Row:
    """Of the completion only."""
    prompt, completion = (
        read_messages(row.get(column), partial(complaint, number, column)) for column in ("prompt", "completion")
    )
    require_answer(completion, partial(complaint, number, "completion"))
    return _chat(prompt + completion, _tools(row, number), len(prompt))


def _chat(messages: list[dict[str, Any]], tools: list[Any] | None, first_learnt: int) -> Row:
    written = {"messages": json.dumps(messages), "tools": json.dumps(tools) if tools else None}
    return NO_TEXT | written | {"first_learnt": first_learnt}


def _instruction(row: Row, number: int) -> Row:
    """One turn of the user, where there are turns: text and conversation both, for the tokenizer to decide."""
    for column in ("instruction", "output"):
        if not is_text(row.get(column)):
            raise complaint(number, column, f"holds {kind_name(row.get(column))}, not text")
    if row.get("input") is not None and not is_text(row["input"]):
        raise complaint(number, "input", f"holds {kind_name(row['input'])}, not text")
    asked = "\n\n".join(filter(None, [row["instruction"], row.get("input")]))
    text = _checked_text(f"{asked}\n", row["output"], number, "output")
    turns = [{"role": "user", "content": asked}, {"role": "assistant", "content": row["output"]}]
    return _chat(turns, None, 0) | {name: text[name] for name in NO_TEXT}


def complaint(number: int, column: str, what: str) -> UserError:
    """What is wrong with a row."""
    return UserError(f"row {number} of the dataset: its column {column} {what}")


def _mapped(columns: Sequence[str], fields: Fields) -> Format:
    sources = {side: _source_of(side, columns, fields) for side in ("prompt", "completion")}
    used = [column for source in sources.values() for column in source.columns]
    return Format("mapped columns", tuple(dict.fromkeys(used)), partial(_render, sources))


@dataclass(frozen=True)
class Side:
    """Where prompt or completion comes from: a template, or a column as it is.

    Attributes:
        flag: of the command line.
        text: the template, or the column's name.
        is_template: which of both.
        columns: that it reads.
    """

    flag: str
    text: str
    is_template: bool
    columns: tuple[str, ...]

    def fill(self, row: Row, number: int) -> str:
        """The text of a row."""
        if not self.is_template:
            value = row.get(self.text)
            if isinstance(value, list | dict):
                raise complaint(number, self.text, f"holds {kind_name(value)}, not text ({self.flag})")
            return as_text(value)
        values = {column: _for_template(row.get(column)) for column in {*row, *self.columns}}
        try:
            return self.text.format_map(values)
        except (AttributeError, LookupError, TypeError, ValueError) as error:
            raise UserError(
                f"{self.flag} {self.text!r} does not fit row {number} of the dataset, {type(error).__name__}: {error}; "
                "name only what every row has (an empty field counts as text)"
            ) from error


def _for_template(value: Any) -> Any:
    """Nothing and truth values as files write them; lists, objects and numbers keep what templates ask of them."""
    return as_text(value) if value is None or isinstance(value, bool) else value


def _render(sources: Mapping[str, Side], row: Row, number: int) -> Row:
    prompt, completion = (sources[side].fill(row, number) for side in ("prompt", "completion"))
    return _checked_text(prompt, completion, number, "completion")


def _source_of(side: str, columns: Sequence[str], fields: Fields) -> Side:
    column, template = getattr(fields, f"{side}_field"), getattr(fields, f"{side}_template")
    if column is None and template is None:
        raise UserError(f"the {side} is not given (--{side}_field): name one of the columns {', '.join(columns)}")
    if column is not None:
        _require_column(column, columns, f"--{side}_field")
    if template is None:
        return Side(f"--{side}_field", column, False, (column,))
    flag = f"--{side}_template"
    return Side(flag, template, True, _columns_of(template, columns, flag))


def _columns_of(template: str, columns: Sequence[str], flag: str) -> tuple[str, ...]:
    try:
        names = [name for _, name, _, _ in string.Formatter().parse(template) if name is not None]
    except ValueError as error:
        raise UserError(f"{flag} {template!r} is no Python format string: {error}") from error
    found = [re.split(r"[.\[]", name)[0] for name in names]
    for column in found:
        _require_column(column, columns, flag)
    return tuple(found)


def _require_column(column: str, columns: Sequence[str], flag: str) -> None:
    if column not in columns:
        raise UserError(
            f"the dataset has no column {column!r} ({flag}): it has {', '.join(columns)}{suggestion(column, columns)}"
        )
