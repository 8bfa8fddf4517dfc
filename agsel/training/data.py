"""The datasets of a run: what its settings name, read before training, and looked at once more as tokens."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset

from agsel.data.fields import Fields
from agsel.data.formats import ROW_NUMBER, choose_format, join, read_rows
from agsel.data.sources import BUILDERS, Source, local_files, open_source
from agsel.errors import UserError, said_of, suggestion
from agsel.training.best import require_metric

Values = Mapping[str, Any]
"""Settings by name."""

READ_EARLY = 10_000_000
"""Bytes: local data up to this size is read before anything is started, of more only the beginning."""
OF_AN_ENTRY = {
    "path": (str,),
    "name": (str,),
    "data_dir": (str,),
    "data_files": (str, list, dict),
    "split": (str,),
    "columns": (list,),
    "fraction": (int, float),
}
"""What one of `datasets` may set, as TRL's DatasetConfig, and as what."""
KINDS = {str: "text", list: "a list", dict: "a mapping", int: "a number", float: "a number"}
EVALUATION = "evaluation data"


READ_BY = (
    *("dataset_name", "dataset_config", "dataset_train_split", "dataset_test_split", "datasets"),
    *("eval_strategy", "eval_dataset", "eval_split_fraction", "eval_tasks", "seed"),
)
"""Settings by which `load_data` reads, beside the columns."""


@dataclass(frozen=True)
class RunData:
    """The rows of a run, in the features of `agsel.data.formats`.

    Attributes:
        train: to train on.
        held_out: to evaluate on, if the run does.
        said: a line for each dataset.
    """

    train: Dataset
    held_out: Dataset | None
    said: tuple[str, ...]


def require_data(values: Values, fields: Fields) -> None:
    """Refuse what can be refused of settings and local files, before anything is started.

    Raises:
        UserError: as of `load_data`.
    """
    sources = training_sources(values)
    for source in sources:
        with _named(source, several=len(sources) > 1):
            _look_at(source, fields)
    held_out = held_out_source(values)
    if held_out is not None:
        with said_of(EVALUATION):
            _look_at(held_out, fields)
    require_metric(values)


def load_data(values: Values, fields: Fields) -> RunData:
    """Read the datasets of a run.

    Args:
        values: the settings of the run, `READ_BY` among them.
        fields: which columns are learnt.

    Raises:
        UserError: settings that contradict each other, no such dataset, or rows that cannot be learnt.
    """
    sources = training_sources(values)
    read = [_read(source, fields, several=len(sources) > 1) for source in sources]
    parts, said = [rows for rows, _ in read], [line for _, line in read]
    shares = [entry["fraction"] for entry in _entries(values) if entry.get("fraction") is not None]
    train = join(_in_shares(parts, shares) if shares else parts)
    source = held_out_source(values)
    if source is not None:
        with said_of(EVALUATION):
            held_out, line = read_rows(source, fields)
        return RunData(train, held_out, (*said, f"{line}; to evaluate on"))
    if values["eval_split_fraction"] is None:
        return RunData(train, None, tuple(said))
    train, held_out = split_off(train, values["eval_split_fraction"], values["seed"])
    said.append(f"{len(held_out):,} of these rows to evaluate on (--eval_split_fraction), {len(train):,} to train on")
    return RunData(train, held_out, tuple(said))


def training_sources(values: Values) -> list[Source]:
    """What `--dataset_name` names, or `datasets` in the file of `--config`.

    Raises:
        UserError: both are given, or an entry of `datasets` is none.
    """
    entries = _entries(values)
    if not entries:
        return [Source(values["dataset_name"], values["dataset_train_split"], values["dataset_config"])]
    for name in ("dataset_name", "dataset_config"):
        if values[name] is not None:
            raise UserError(f"--{name} and datasets are both given: leave one out")
    given = [entry.get("fraction") for entry in entries]
    if any(fraction is not None for fraction in given):
        for fraction in given:
            if fraction is None or not 0 < fraction < math.inf:
                raise UserError(f"datasets: fraction is {fraction} for one: give every dataset one above 0, or none")
    return [_source_of(entry) for entry in entries]


def held_out_source(values: Values) -> Source | None:
    """What is evaluated on, unless it is a part of the training data or nothing.

    Raises:
        UserError: it is given twice, or is never read, or nothing is given to evaluate on.
    """
    name, fraction = values["eval_dataset"], values["eval_split_fraction"]
    if name is not None and fraction is not None:
        raise UserError("--eval_dataset and --eval_split_fraction are both given: leave one out")
    if fraction is not None and not 0 < fraction < 1:
        raise UserError(f"--eval_split_fraction is {fraction}: it must be above 0 and below 1, for example 0.05")
    if values["eval_strategy"] == "no":
        for setting in ("eval_dataset", "eval_split_fraction", "eval_tasks"):
            if values[setting] is not None:
                raise UserError(f"--{setting} would never be read: set --eval_strategy to steps or epoch too")
        return None
    if name is not None:
        return _source_to_evaluate(name, values["dataset_test_split"])
    if fraction is not None:
        return None
    if _entries(values):
        raise UserError(
            "nothing to evaluate on: beside datasets name it with --eval_dataset, or split it off with "
            "--eval_split_fraction"
        )
    return Source(values["dataset_name"], values["dataset_test_split"], values["dataset_config"])


def split_off(rows: Dataset, fraction: float, seed: int) -> tuple[Dataset, Dataset]:
    """(rows to train on, rows to evaluate on), drawn at random; both stay in order.

    Raises:
        UserError: one of both would have no rows.
    """
    number = round(fraction * len(rows))
    if not 0 < number < len(rows):
        raise UserError(
            f"--eval_split_fraction {fraction} of {len(rows)} rows leaves no rows for one of both: change it"
        )
    drawn = np.zeros(len(rows), dtype=bool)
    drawn[np.random.default_rng(seed).permutation(len(rows))[:number]] = True
    return rows.select(np.flatnonzero(~drawn)), rows.select(np.flatnonzero(drawn))


def require_labels(prepared: Dataset, rows: Dataset, max_length: int | None) -> None:
    """Check the trainer's tokenised dataset: every row has kept at least one label.

    Args:
        prepared: what `SFTTrainer` made of the rows.
        rows: that it was given.
        max_length: tokens after which it truncates.

    Raises:
        UserError: all labels of a row are masked; names the first such row.
    """
    if ROW_NUMBER not in prepared.column_names:
        return _require_packed_labels(prepared, max_length)
    lost = sorted(_numbers(rows) - _numbers(prepared))
    if lost:
        raise UserError(
            f"row {lost[0]} of the dataset has no label left, as its prompt alone fills --max_length {max_length} "
            f"({len(lost)} of {len(rows)} rows): raise --max_length or remove the row"
        )


def _numbers(rows: Dataset) -> set[int]:
    """Of all rows, read in one piece: a column by itself is read row by row."""
    return {*rows.select_columns([ROW_NUMBER])[:][ROW_NUMBER]}


def _require_packed_labels(prepared: Dataset, max_length: int | None) -> None:
    for labels in prepared["labels"]:
        if all(label == -100 for label in labels):
            raise UserError(
                f"a packed sequence has no label left, as the prompt of a row fills --max_length {max_length}: "
                "raise --max_length, or set --packing false to be told the row"
            )


def _look_at(source: Source, fields: Fields) -> None:
    paths = local_files(source)
    if paths is None:
        return
    if sum(path.stat().st_size for path in paths) <= READ_EARLY:
        read_rows(source, fields)
    else:
        choose_format(open_source(source), fields, source)


def _read(source: Source, fields: Fields, *, several: bool) -> tuple[Dataset, str]:
    with _named(source, several=several):
        return read_rows(source, fields)


def _named(source: Source, *, several: bool) -> AbstractContextManager[None]:
    return said_of(source.name) if several else nullcontext()


def _in_shares(parts: Sequence[Dataset], shares: Sequence[float]) -> list[Dataset]:
    """The first rows of each, in these shares of the largest whole that needs no row twice (as TRL's `get_dataset`)."""
    weights = [share / sum(shares) for share in shares]
    whole = min(len(part) / weight for part, weight in zip(parts, weights, strict=True))
    numbers = [round(weight * whole) for weight in weights]
    if 0 in numbers:
        raise UserError(f"datasets: fraction {shares[numbers.index(0)]} leaves its dataset no row: raise it")
    return [part.select(range(number)) for part, number in zip(parts, numbers, strict=True)]


def _entries(values: Values) -> list[dict[str, Any]]:
    """Of `datasets`, each a mapping: on the command line they are written as JSON."""
    return [_entry(entry) for entry in values["datasets"] or ()]


def _entry(entry: Any) -> dict[str, Any]:
    if isinstance(entry, str):
        with suppress(ValueError):
            entry = json.loads(entry)
    if not isinstance(entry, dict) or not entry.get("path"):
        raise UserError(f"datasets: {entry!r} has no path: write one `path: NAME_OR_FILE` for each dataset")
    for name, value in entry.items():
        if name not in OF_AN_ENTRY:
            raise UserError(f"datasets: unknown setting {name!r}{suggestion(str(name), OF_AN_ENTRY)}")
        if value is not None and not isinstance(value, OF_AN_ENTRY[name]):
            kinds = " or ".join(dict.fromkeys(KINDS[kind] for kind in OF_AN_ENTRY[name]))
            raise UserError(f"datasets: {name} is {value!r}: it must be {kinds}")
    return entry


def _source_of(entry: Mapping[str, Any]) -> Source:
    name, folder, files = entry["path"], entry.get("data_dir"), entry.get("data_files")
    if folder is not None and files is None and (name in BUILDERS or Path(name).is_dir()):
        name, folder = folder if name in BUILDERS else str(Path(name, folder)), None
    columns = entry.get("columns")
    return Source(
        name,
        split=entry.get("split") or "train",
        config=entry.get("name"),
        files=files,
        folder=folder,
        columns=tuple(columns) if columns else None,
        flag="datasets: path",
    )


def _source_to_evaluate(name: str, split: str) -> Source:
    """A single file is the split train, whatever its name."""
    source = Source(name, split, flag="--eval_dataset", split_flags="--dataset_test_split")
    return replace(source, split="train") if Path(name).is_file() and split == "test" else source
