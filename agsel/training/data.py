"""Datasets: load a hub name or a local file, map its columns to TRL's formats, refuse rows that would train nothing."""

import re
import string
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset, load_dataset
from datasets.exceptions import DatasetGenerationError

from agsel.errors import UserError, suggestion
from agsel.training.arguments import DataArguments

LOADERS = {".json": "json", ".jsonl": "json", ".parquet": "parquet"}
ROW_NUMBER = "agsel_row"


def load_rows(name: str | None, split: str, config: str | None = None) -> Dataset:
    """Load one split of a dataset of the hub, of a dataset folder or of a local JSON, JSON Lines or Parquet file.

    Args:
        name: hub name or path. A local file has one split, `train`; `train[90%:]` takes a part of it.
        split: split expression as `datasets` reads it.
        config: configuration name, for hub datasets that have several.

    Raises:
        UserError: no name, no such file, unreadable file, no such split, or no rows.
    """
    if not name:
        raise UserError("no dataset: name a hub dataset or a .json, .jsonl or .parquet file (--dataset_name)")
    loader = LOADERS.get(Path(name).suffix)
    if loader and not Path(name).is_file():
        raise UserError(f"no such file: {name} (--dataset_name)")
    if loader and not Path(name).stat().st_size:
        raise UserError(f"{name} is empty (--dataset_name)")
    try:
        rows = load_dataset(loader, data_files=name, split=split) if loader else load_dataset(name, config, split=split)
    except DatasetGenerationError as error:
        raise UserError(f"cannot read {name} (--dataset_name): {error.__cause__ or error}") from error
    except ValueError as error:
        raise UserError(
            f"cannot load {name} (--dataset_name), split {split!r} (--dataset_train_split, --dataset_test_split; "
            f"train[90%:] is the end of train): {error}"
        ) from error
    except OSError as error:
        raise UserError(
            f"cannot find or reach the dataset {name} (--dataset_name): {error}; correct the name, or give a file"
        ) from error
    if not len(rows):
        raise UserError(f"{name} has no rows in split {split!r} (--dataset_name): give it at least one")
    return rows


def to_training_format(rows: Dataset, arguments: DataArguments) -> Dataset:
    """Rows in TRL's prompt-completion format, or unchanged where they have one of TRL's formats and no mapping is set.

    Every row gets its number in a column of its own, by which `require_labels` names the rows that TRL drops.

    Raises:
        UserError: a field or template names a missing column, one of prompt and completion is not given, or a row
            has nothing to learn.
    """
    sources = _sources(rows, arguments)
    if sources:
        rows = rows.map(
            _render,
            with_indices=True,
            fn_kwargs={"sources": sources},
            remove_columns=rows.column_names,
            desc="Mapping columns",
        )
    _require_known_format(rows)
    _require_targets(rows)
    return rows.add_column(ROW_NUMBER, list(range(len(rows))))


def require_labels(prepared: Dataset, number_of_rows: int, max_length: int | None) -> None:
    """Check the trainer's tokenised dataset: every row has kept at least one label.

    Args:
        prepared: what `SFTTrainer` made of the rows of `to_training_format`.
        number_of_rows: how many rows it was given.
        max_length: tokens after which it truncates.

    Raises:
        UserError: all labels of a row are masked; names the first such row.
    """
    if ROW_NUMBER not in prepared.column_names:
        return _require_packed_labels(prepared, max_length)
    lost = sorted(set(range(number_of_rows)) - set(prepared[ROW_NUMBER]))
    if lost:
        raise UserError(
            f"row {lost[0]} of the dataset has no label left, as its prompt alone fills --max_length {max_length} "
            f"({len(lost)} of {number_of_rows} rows): raise --max_length or remove the row"
        )


def _require_packed_labels(prepared: Dataset, max_length: int | None) -> None:
    for labels in prepared["labels"]:
        if all(label == -100 for label in labels):
            raise UserError(
                f"a packed sequence has no label left, as the prompt of a row fills --max_length {max_length}: "
                "raise --max_length, or set --packing false to be told the row"
            )


def _sources(rows: Dataset, arguments: DataArguments) -> dict[str, tuple[str, bool]]:
    """For prompt and completion a template or a column, and whether it is a template; nothing where none is set."""
    columns = rows.column_names
    given = {
        side: (getattr(arguments, f"{side}_field"), getattr(arguments, f"{side}_template"))
        for side in ("prompt", "completion")
    }
    if not any(any(pair) for pair in given.values()):
        if not {"prompt", "completion"} <= set(columns) and "messages" not in columns:
            raise UserError(
                f"the dataset has the columns {', '.join(columns)}: say which are prompt and completion "
                "(--prompt_field, --completion_field), or bring prompt and completion, or messages"
            )
        return {}
    sources = {}
    for side, (column, template) in given.items():
        if column is None and template is None:
            raise UserError(f"the {side} is not given (--{side}_field): name one of the columns {', '.join(columns)}")
        if column is not None:
            _require_column(column, columns, f"--{side}_field")
        if template:
            _check_template(template, columns, f"--{side}_template")
        sources[side] = (template, True) if template else (column, False)
    return sources


def _check_template(template: str, columns: list[str], flag: str) -> None:
    try:
        names = [name for _, name, _, _ in string.Formatter().parse(template) if name is not None]
    except ValueError as error:
        raise UserError(f"{flag} {template!r} is no Python format string: {error}") from error
    for name in names:
        _require_column(re.split(r"[.\[]", name)[0], columns, flag)


def _require_column(column: str, columns: list[str], flag: str) -> None:
    if column not in columns:
        raise UserError(
            f"the dataset has no column {column!r} ({flag}): it has {', '.join(columns)}{suggestion(column, columns)}"
        )


def _render(row: Mapping[str, Any], number: int, sources: Mapping[str, tuple[str, bool]]) -> dict[str, str]:
    values = {column: "" if value is None else value for column, value in row.items()}
    return {
        side: _fill(source, values, f"--{side}_template", number) if is_template else str(values[source])
        for side, (source, is_template) in sources.items()
    }


def _fill(template: str, values: Mapping[str, Any], flag: str, number: int) -> str:
    try:
        return template.format_map(values)
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        raise UserError(
            f"{flag} {template!r} does not fit row {number} of the dataset, {type(error).__name__}: {error}; "
            "name only what every row has (an empty field counts as text)"
        ) from error


def _require_known_format(rows: Dataset) -> None:
    """What is learnt is text, or messages as TRL reads them. A column has one type: its first value tells."""
    columns = ("prompt", "completion") if "completion" in rows.column_names else ("messages",)
    first = rows[0]
    for column in columns:
        value = first.get(column)
        if isinstance(value, list):
            _require_messages(value, column)
        elif not isinstance(value, str | None):
            raise UserError(
                f"the {column} column of the dataset holds {type(value).__name__}, not text: "
                "--prompt_field prompt --completion_field completion make text of any column"
            )


def _require_messages(messages: Sequence[Any], column: str) -> None:
    for message in messages:
        if not isinstance(message, Mapping) or "role" not in message or "content" not in message:
            found = ", ".join(message) if isinstance(message, Mapping) else type(message).__name__
            raise UserError(
                f"the {column} column of the dataset is no list of messages with role and content, it has {found}: "
                "rename these, or name columns of text (--prompt_field, --completion_field)"
            )


def _require_targets(rows: Dataset) -> None:
    """Every row has a completion or, in the messages format, something that the assistant says."""
    column = "completion" if "completion" in rows.column_names else "messages"
    for number, target in enumerate(rows[column]):
        if not _has_text(target):
            raise UserError(
                f"row {number} of the dataset has nothing to learn: its {column} column has no text of the "
                "assistant; remove the row or correct --completion_field and --completion_template"
            )


def _has_text(target: Any) -> bool:
    if isinstance(target, list):
        return any(message["role"] == "assistant" and message.get("content") for message in target)
    return bool(target and target.strip())
