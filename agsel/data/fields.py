"""What users say of the columns of their dataset: which are prompt and completion, or templates over them."""

from __future__ import annotations

import re
import string
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from agsel.data.sources import Row, complaint
from agsel.data.values import as_text, kind_name
from agsel.errors import UserError, suggestion

TEMPLATES = ("prompt_template", "completion_template")
ESCAPES = {r"\n": "\n", r"\t": "\t", r"\\": "\\"}


@dataclass
class Fields:
    """Which columns of the dataset are the prompt and the completion; None where nothing is said."""

    _argument_group_name = "columns of the dataset"

    prompt_field: str | None = field(
        default=None,
        metadata={
            "help": "Column with the prompt, for example `question`. Leave both fields and templates out for datasets "
            "with prompt and completion, messages, conversations (ShareGPT), or instruction and output (Alpaca)."
        },
    )
    completion_field: str | None = field(
        default=None, metadata={"help": "Column with the text to learn, for example `answer`."}
    )
    prompt_template: str | None = field(
        default=None,
        metadata={
            "help": "Python format string over the row's columns that makes the prompt, for example "
            r"'Question: {question}\nAnswer:'. On the command line \n is a line break, \t a tab, \\ a backslash. "
            "Default: the prompt field as it is."
        },
    )
    completion_template: str | None = field(
        default=None,
        metadata={
            "help": "The same for the completion, for example ' {answer}'. The end-of-sequence token is added to it."
        },
    )

    def __bool__(self) -> bool:
        given = (self.prompt_field, self.completion_field, self.prompt_template, self.completion_template)
        return any(value is not None for value in given)


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
            if isinstance(value, list | dict | bytes):
                raise complaint(number, self.text, f"holds {kind_name(value)}, not text ({self.flag})")
            return as_text(value)
        try:
            return _Template().vformat(self.text, (), {column: row.get(column) for column in self.columns})
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
            raise UserError(
                f"{self.flag} {self.text!r} does not fit row {number} of the dataset, {type(error).__name__}: {error}; "
                "name only what every row has (an empty field counts as text)"
            ) from error


class _Template(string.Formatter):
    """Fills in values as files write them. `{price:.2f}` and `{tags[0]}` see numbers, lists and objects."""

    def get_value(self, key: int | str, arguments: Sequence[Any], values: Mapping[str, Any]) -> Any:
        return values[str(key)]

    def get_field(self, name: str, arguments: Sequence[Any], values: Mapping[str, Any]) -> Any:
        value, first = super().get_field(name, arguments, values)
        if isinstance(value, bytes) or callable(value):
            raise TypeError(f"{name} is {kind_name(value)}, not text")
        return as_text(value) if isinstance(value, bool | list | dict | None) else value, first


def side_of(side: str, columns: Sequence[str], fields: Fields) -> Side:
    """Where prompt or completion comes from.

    Raises:
        UserError: nothing is said of it, or a column is missing.
    """
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
        found = [re.split(r"[.\[]", name)[0] for name in _names_in(template)]
    except ValueError as error:
        raise UserError(f"{flag} {template!r} is no Python format string: {error}") from error
    for column in found:
        _require_column(column, columns, flag)
    return tuple(found)


def _names_in(template: str) -> Iterator[str]:
    """Also those inside format specifications, as in `{price:{width}}`."""
    for _, name, specification, _ in string.Formatter().parse(template):
        if name is not None:
            yield name
            yield from _names_in(specification or "")


def _require_column(column: str, columns: Sequence[str], flag: str) -> None:
    if column not in columns:
        raise UserError(
            f"the dataset has no column {column!r} ({flag}): it has {', '.join(columns)}{suggestion(column, columns)}"
        )


def with_line_breaks(words: Sequence[str]) -> list[str]:
    r"""`\n`, `\t` and `\\` in templates as what they stand for: shells leave them as they are."""
    changed = list(words)
    for place, word in enumerate(words):
        name, is_one_word, value = word.partition("=")
        if not name.startswith("--") or name[2:].replace("-", "_") not in TEMPLATES:
            continue
        if is_one_word:
            changed[place] = f"{name}={unescape(value)}"
        elif place + 1 < len(words):
            changed[place + 1] = unescape(words[place + 1])
    return changed


def escape(template: str) -> str:
    """What `unescape` makes the template of."""
    return template.replace("\\", r"\\")


def unescape(template: str) -> str:
    r"""`\n` as a line break, `\t` as a tab, `\\` as a backslash; others stay."""
    return re.sub(r"\\[nt\\]", lambda found: ESCAPES[found[0]], template)
