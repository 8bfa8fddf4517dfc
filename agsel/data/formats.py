"""One rule decides by its columns what a dataset is; every row is then made into text or a conversation, and checked.

Whatever the format, a row becomes the same few columns (`FEATURES`): text has `prompt` and `completion`, a conversation
`messages` and `tools` as JSON, and the number of the first message that may be learnt.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, Features, Value, concatenate_datasets

from agsel.data.fields import Fields, Side, side_of
from agsel.data.messages import is_sharegpt, read_messages, read_tools, require_answer
from agsel.data.sources import Row, Rows, Source, TypedRows, complaint, open_source
from agsel.data.values import is_text, kind_name
from agsel.errors import UserError

ROW_NUMBER = "agsel_row"
FEATURES = Features(
    {
        "prompt": Value("string"),
        "completion": Value("string"),
        "messages": Value("string"),
        "tools": Value("string"),
        "first_learnt": Value("int64"),
        ROW_NUMBER: Value("int64"),
    }
)
TEXT_TYPES = (Value("string"), Value("large_string"))
ROWS_AT_ONCE = 10_000
NO_TEXT: Row = {"prompt": None, "completion": None}
NO_MESSAGES: Row = {"messages": None, "tools": None, "first_learnt": None}


@dataclass(frozen=True)
class Format:
    """What a dataset is.

    Attributes:
        name: for people.
        used: columns that are read of the rows that have them.
        make: a row of `FEATURES` from a row and its number.
    """

    name: str
    used: tuple[str, ...]
    make: Callable[[Row, int], Row]


def read_rows(source: Source, fields: Fields) -> tuple[Dataset, str]:
    """The rows of a dataset in `FEATURES`, and a line that says what they were.

    Raises:
        UserError: no such dataset, columns of no known format, or a row that cannot be learnt.
    """
    rows = open_source(source)
    form = choose_format(rows, fields, source)
    make = partial(_numbered, form.make, rules())
    made = _take_text(rows, form) if _is_plain_text(rows, form) else rows.convert(make, form.used, FEATURES)
    used = [column for column in form.used if column in rows.columns]
    dropped = [column for column in rows.columns if column not in used]
    said = f"{source.name} [{source.split}]: {form.name} ({', '.join(used)}), {len(made):,} rows"
    return made, said + (f"; dropped: {', '.join(dropped)}" if dropped else "")


def join(parts: Sequence[Dataset]) -> Dataset:
    """Several datasets one after another; rows are numbered through."""
    if len(parts) == 1:
        return parts[0]
    return _numbered_through(concatenate_datasets([part.remove_columns(ROW_NUMBER) for part in parts]))


def _numbered_through(rows: Dataset, **columns: pa.Array) -> Dataset:
    """With more columns; `Dataset.add_column` goes through millions of rows one by one."""
    columns[ROW_NUMBER] = pa.array(range(len(rows)))
    features = Features({name: FEATURES[name] for name in columns})
    whole = concatenate_datasets([rows, Dataset.from_dict(columns, features)], axis=1)
    return whole.select_columns(list(FEATURES))


@cache
def rules() -> str:
    """What changes when this package does: `datasets` would go on giving what other rules have made."""
    sources = (path.read_bytes() for path in sorted(Path(__file__).parent.glob("*.py")))
    return hashlib.sha256(b"".join(sources)).hexdigest()


def _numbered(make: Callable[[Row, int], Row], _rules: str, row: Row, number: int) -> Row:
    made = make(row, number)
    _require_whole_characters(made, number)
    return made | {ROW_NUMBER: number}


def _require_whole_characters(made: Row, number: int) -> None:
    r"""JSON can write half of a character, as `\ud83d`, which is no text that could be written or tokenised."""
    try:
        "".join(value for value in made.values() if isinstance(value, str)).encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"row {number} of the dataset holds half of a character, {error.object[error.start]!a}: write it whole"
        ) from error


def choose_format(rows: Rows, fields: Fields, source: Source) -> Format:
    """By the columns, in this order: what the user says; prompt and completion; messages; conversations; instructions.

    Raises:
        UserError: the columns are of none of these.
    """
    columns = set(rows.columns)
    if fields:
        return _mapped(rows.columns, fields)
    if {"prompt", "completion"} <= columns:
        return _prompt_and_completion(rows)
    for column in ("messages", "conversations"):
        if column in columns:
            sharegpt = is_sharegpt(rows.first(column))
            name = "ShareGPT conversations" if sharegpt else "messages"
            return Format(name, rows.offered((column, "tools")), partial(_conversation, column, sharegpt))
    if {"instruction", "output"} <= columns:
        return Format("Alpaca instructions", rows.offered(("instruction", "input", "output")), _instruction)
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


def _prompt_and_completion(rows: Rows) -> Format:
    if isinstance(rows.first("completion"), list):
        used = rows.offered(("prompt", "completion", "tools"))
        return Format("prompt and completion of messages", used, _two_parts)
    return Format("prompt and completion", ("prompt", "completion"), _text)


def _text(row: Row, number: int) -> Row:
    for column in ("prompt", "completion"):
        value = row.get(column)
        if not is_text(value):
            simple = not isinstance(value, list | dict | None)
            hint = f"; --{column}_field {column} makes text of it" if simple else ""
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
    return all(rows.rows.features[column] in TEXT_TYPES for column in form.used)


def _take_text(rows: Rows, form: Format) -> Dataset:
    assert isinstance(rows, TypedRows), "of _is_plain_text"
    texts = Features({column: FEATURES[column] for column in form.used})
    chosen = rows.rows.select_columns(list(form.used)).cast(texts)  # also of a split expression only its rows
    for column in form.used:
        missing = first_row(chosen, column, pc.is_null)
        if missing is not None:
            raise complaint(missing, column, "holds null, not text")
    blank = first_row(chosen, "completion", _is_blank)
    if blank is not None:
        _checked_text("", "", blank, "completion")
    return _numbered_through(chosen, **{name: pa.nulls(len(chosen)) for name in NO_MESSAGES})


def first_row(rows: Dataset, column: str, test: Callable[[pa.ChunkedArray], pa.ChunkedArray]) -> int | None:
    """Number of the first whose column passes; a part at a time, as columns can be larger than the memory."""
    parts = rows.select_columns([column]).with_format("arrow").iter(ROWS_AT_ONCE)
    for start, part in zip(itertools.count(0, ROWS_AT_ONCE), parts, strict=False):
        found = pc.index(test(part[column]), pa.scalar(True)).as_py()
        if found >= 0:
            return start + found
    return None


def _is_blank(texts: pa.ChunkedArray) -> pa.ChunkedArray:
    return pc.equal(pc.utf8_trim_whitespace(texts), "")


def _conversation(column: str, sharegpt: bool, row: Row, number: int) -> Row:
    def complain(what: str) -> UserError:
        return complaint(number, column, what)

    messages = read_messages(row.get(column), complain, sharegpt=sharegpt)
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
    written = {"messages": _dumps(messages), "tools": _dumps(tools) if tools else None}
    return NO_TEXT | written | {"first_learnt": first_learnt}


def _dumps(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


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


def _mapped(columns: Sequence[str], fields: Fields) -> Format:
    sources = {side: side_of(side, columns, fields) for side in ("prompt", "completion")}
    used = [column for source in sources.values() for column in source.columns]
    if not used:
        raise UserError("no column is learnt: name one in --completion_template, for example '{answer}'")
    return Format("mapped columns", tuple(dict.fromkeys(used)), partial(_render, sources))


def _render(sources: Mapping[str, Side], row: Row, number: int) -> Row:
    prompt, completion = (sources[side].fill(row, number) for side in ("prompt", "completion"))
    return _checked_text(prompt, completion, number, "completion")
