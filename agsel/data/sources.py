"""Where rows come from: the hub, a folder, a file. Text arrives as it stands in the file."""

from __future__ import annotations

import csv
import glob
import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import fsspec
from datasets import Dataset, Features, ReadInstruction, load_dataset
from datasets.data_files import EmptyDatasetError, get_data_patterns
from datasets.exceptions import DatasetGenerationError

from agsel.data.values import FileNumber, kind_name, without_nulls
from agsel.errors import AgselError, UserError, one_line

Row = dict[str, Any]
Convert = Callable[[Row, int], Row]
"""Takes a row and its number."""

DELIMITERS = {".csv": ",", ".tsv": "\t"}
TEXT_FILES = (".json", ".jsonl", *DELIMITERS)
FILES = (*TEXT_FILES, ".parquet")
BUILDERS = ("json", "csv", "parquet")
"""Names that `datasets` has for kinds of files."""
COMPRESSIONS = (".gz", ".zst", ".xz", ".bz2")
ROWS_SAMPLED = 1000
"""The columns of a text file are those of its first rows."""


@dataclass(frozen=True)
class Source:
    """A dataset as the user names it.

    Attributes:
        name: hub name, folder, or file.
        split: as `datasets` reads it, `train[90%:]` included. A single file has one, `train`.
        config: of a hub dataset that has several.
        files: of a hub dataset or of a folder, or for a builder such as `json`.
        folder: of a hub dataset.
        columns: that are there; None for all.
        flag: of the command line, for error messages.
    """

    name: str
    split: str = "train"
    config: str | None = None
    files: Any = None
    folder: str | None = None
    columns: tuple[str, ...] | None = None
    flag: str = "--dataset_name"


def complaint(number: int, column: str, what: str) -> UserError:
    """What is wrong with a row."""
    return UserError(f"row {number} of the dataset: its column {column} {what}")


class TypedRows:
    """Rows of a hub dataset or of Parquet files: their columns have types already."""

    def __init__(self, rows: Dataset) -> None:
        self.rows = rows
        self.columns = tuple(rows.column_names)
        self.first: Row = rows[0]

    def convert(self, make: Convert, features: Features, description: str) -> Dataset:
        """A row of `features` from every row. What a row has not got is null in a column with a type: left out."""
        return self.rows.map(
            lambda row, number: make(without_nulls(row), number),
            with_indices=True,
            remove_columns=self.rows.column_names,
            features=features,
            desc=description,
        )


class WrittenRows:
    """Rows of JSON or CSV files, read anew as they are written whenever they are asked for."""

    def __init__(self, paths: Sequence[Path], split: str) -> None:
        self._paths, self._split = list(paths), split
        sample = list(itertools.islice(read_files(self._paths), ROWS_SAMPLED))
        self.columns = tuple(dict.fromkeys(column for row in sample for column in row))
        self.first: Row = sample[0] if sample else {}

    def convert(self, make: Convert, features: Features, description: str) -> Dataset:
        """A row of `features` from every row of the split."""
        stamps = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in self._paths]
        try:
            whole = Dataset.from_generator(
                _converted,
                features=features,
                gen_kwargs={"stamps": stamps, "make": make},
            )
        except DatasetGenerationError as error:
            raise _cause(error) from error
        return _part(whole, self._split)


Rows = TypedRows | WrittenRows


def open_source(source: Source) -> Rows:
    """Look at a dataset.

    Raises:
        UserError: no name, no such dataset, file or split, an unreadable file, or no rows.
    """
    paths = local_files(source)
    if paths is not None and kind_of(paths[0]) in TEXT_FILES:
        rows: Rows = WrittenRows(paths, source.split)
        if not rows.columns:
            raise UserError(f"{source.name} has no rows ({source.flag}): give it at least one")
    else:
        rows = TypedRows(_load(source, paths))
    if source.columns is not None:
        _require_columns(source, rows)
        rows.columns = tuple(column for column in rows.columns if column in source.columns)
    return rows


def _require_columns(source: Source, rows: Rows) -> None:
    missing = [column for column in source.columns or () if column not in rows.columns]
    if missing:
        there = ", ".join(rows.columns)
        raise UserError(f"{source.name} has no column {missing[0]!r} (datasets: columns): it has {there}")


def kind_of(path: Path) -> str:
    """The ending that tells how to read a file, in lower case and without that of a compression; empty for others."""
    endings = [ending.lower() for ending in path.suffixes]
    if endings and endings[-1] in COMPRESSIONS:
        endings.pop()
    return endings[-1] if endings and endings[-1] in FILES else ""


def local_files(source: Source) -> list[Path] | None:
    """The files of the split, None for a hub dataset.

    Raises:
        UserError: there are none.
    """
    if not source.name:
        raise UserError(f"no dataset: name a hub dataset, a folder or a {', '.join(FILES)} file ({source.flag})")
    path = Path(source.name)
    if source.files is not None:
        return _named_files(source)
    if kind_of(path):
        return [_readable(path, source)]
    return _files_in_folder(path, source) if path.is_dir() else None


def _named_files(source: Source) -> list[Path] | None:
    """`path: json` with `data_files`, as `datasets` takes it, or files of a folder."""
    base = Path(source.name)
    if source.name not in BUILDERS and not base.is_dir():
        return None
    files = source.files
    if isinstance(files, Mapping):
        files = files.get(_split_name(source.split), [])
    names = [files] if isinstance(files, str) else list(files)
    if not names:
        raise UserError(f"data_files has nothing for the split {source.split!r} ({source.flag}): name a file")
    if any("://" in name for name in names):
        return None
    base = Path() if source.name in BUILDERS else base
    return [_readable(path, source) for name in names for path in _expanded(base / name)]


def _expanded(path: Path) -> list[Path]:
    """What a pattern such as `part-*.jsonl` stands for."""
    return sorted(map(Path, glob.glob(str(path), recursive=True))) if glob.has_magic(str(path)) else [path]


def _readable(path: Path, source: Source) -> Path:
    if not path.is_file():
        raise UserError(f"no such file: {path} ({source.flag})")
    if not kind_of(path):
        raise UserError(f"{path} ({source.flag}) has none of the endings {', '.join(FILES)}: give it one")
    if not path.stat().st_size:
        raise UserError(f"{path} is empty ({source.flag})")
    if _split_name(source.split) != "train" and source.files is None:
        raise UserError(
            f"{path} is one file, which has the split train, not {source.split!r} (--dataset_train_split, "
            "--dataset_test_split): train[90%:] is the end of it, --eval_dataset names another file"
        )
    return path


def _files_in_folder(folder: Path, source: Source) -> list[Path] | None:
    """Those of the split by the names that `datasets` knows, such as train.jsonl and test.jsonl; all of one kind."""
    try:
        patterns = get_data_patterns(str(folder.resolve()))
    except EmptyDatasetError as error:
        raise UserError(f"{folder} holds no data files ({source.flag}): it needs {', '.join(FILES)} files") from error
    by_split = {str(split): _matching(found) for split, found in patterns.items()}
    by_split = {split: paths for split, paths in by_split.items() if paths}
    wanted = _split_name(source.split)
    if not by_split:
        return None
    if wanted not in by_split:
        raise UserError(
            f"{folder} ({source.flag}) has no files for the split {wanted!r} (--dataset_train_split, "
            f"--dataset_test_split), only for {', '.join(by_split)}"
        )
    kinds = sorted({kind_of(path) for path in by_split[wanted]})
    if len(kinds) > 1:
        raise UserError(f"{folder} ({source.flag}) has files of several kinds, {', '.join(kinds)}: name one file")
    return by_split[wanted]


def _matching(patterns: Iterable[str]) -> list[Path]:
    files = fsspec.filesystem("file")
    found = sorted({Path(str(path)) for pattern in patterns for path in files.glob(pattern)})
    return [path for path in found if path.is_file() and kind_of(path)]


def _load(source: Source, paths: Sequence[Path] | None) -> Dataset:
    name, split = source.name, source.split
    try:
        if paths is not None:
            rows = _part(load_dataset("parquet", data_files=[str(path) for path in paths], split="train"), split)
        else:
            rows = load_dataset(name, source.config, data_dir=source.folder, data_files=source.files, split=split)
    except DatasetGenerationError as error:
        raise UserError(f"cannot read {name} ({source.flag}): {one_line(error.__cause__ or error)}") from error
    except ValueError as error:
        raise UserError(
            f"cannot load {name} ({source.flag}), split {split!r} (--dataset_train_split, --dataset_test_split; "
            f"train[90%:] is the end of train): {one_line(error)}"
        ) from error
    except OSError as error:
        raise UserError(
            f"cannot find or reach the dataset {name} ({source.flag}): {one_line(error)}; correct the name, or give a "
            "file"
        ) from error
    if not len(rows):
        raise UserError(f"{name} has no rows in split {split!r} ({source.flag}): give it at least one")
    return rows


def _split_name(split: str) -> str:
    return split.partition("[")[0]


def _part(whole: Dataset, split: str) -> Dataset:
    """The rows of a split expression, which names one split."""
    name = _split_name(split)
    try:
        parts = ReadInstruction.from_spec(split).to_absolute({name: len(whole)})
    except (ValueError, AssertionError) as error:
        raise UserError(
            f"{split!r} is no part of {name} (--dataset_train_split, --dataset_test_split): write train[90%:] or "
            f"train[:1000] ({one_line(error)})"
        ) from error
    chosen = [index for part in parts for index in range(part.from_ or 0, len(whole) if part.to is None else part.to)]
    if not chosen:
        raise UserError(f"{split!r} has no rows (--dataset_train_split, --dataset_test_split): there are {len(whole)}")
    return whole if len(chosen) == len(whole) else whole.select(chosen)


def _converted(stamps: Sequence[tuple[str, int, int]], make: Convert) -> Iterator[Row]:
    for number, row in enumerate(read_files([Path(path) for path, _, _ in stamps])):
        yield make(row, number)


def _cause(error: BaseException) -> AgselError | UserError:
    """What was wrong with the rows, found below what `datasets` made of it."""
    found: BaseException | None = error
    while found is not None:
        if isinstance(found, AgselError):
            return found
        found = found.__cause__ or found.__context__
    raise error


def read_files(paths: Iterable[Path]) -> Iterator[Row]:
    """The rows of JSON or CSV files one after another, numbers as `FileNumber`.

    Raises:
        UserError: a file is not what its ending says.
    """
    for path in paths:
        kind = kind_of(path)
        try:
            with fsspec.open(str(path), "rt", encoding="utf-8-sig", newline="", compression="infer") as file:
                yield from _read_table(file, path, DELIMITERS[kind]) if kind in DELIMITERS else _read_json(file, path)
        except (OSError, EOFError, UnicodeDecodeError, csv.Error, ImportError, ValueError) as error:
            if isinstance(error, AgselError):
                raise
            raise UserError(f"cannot read {path}: {one_line(error)}") from error


def _read_table(file: IO[str], path: Path, delimiter: str) -> Iterator[Row]:
    csv.field_size_limit(2**31 - 1)
    reader = csv.reader(file, delimiter=delimiter, strict=True)
    header = next(reader, [])
    for number, values in enumerate(filter(None, reader)):
        if len(values) != len(header):
            raise UserError(
                f"row {number} of {path} has {len(values)} fields, its first line names {len(header)}: correct it, or "
                "put text with a delimiter or a line break in quotes"
            )
        yield dict(zip(header, values, strict=True))


def _read_json(file: IO[str], path: Path) -> Iterator[Row]:
    """One row a line, or one list of rows."""
    first = next((line for line in file if line.strip()), "")
    if first.lstrip().startswith("[") or not _is_json(first):
        yield from _read_json_list(first + file.read(), path)
        return
    for number, line in enumerate(line for line in itertools.chain([first], file) if line.strip()):
        try:
            row = _loads(line)
        except ValueError as error:
            raise UserError(f"cannot read {path}: row {number} is no JSON, {error}") from error
        yield _require_object(row, number, path)


def _read_json_list(text: str, path: Path) -> Iterator[Row]:
    rows = _loads(text)
    if not isinstance(rows, list):
        raise UserError(f"cannot read {path}: it holds {kind_name(rows)}; write a list of rows, or one row a line")
    for number, row in enumerate(rows):
        yield _require_object(row, number, path)


def _require_object(row: Any, number: int, path: Path) -> Row:
    if not isinstance(row, dict):
        raise UserError(f"cannot read {path}: row {number} is no JSON object, but {json.dumps(row)[:40]}")
    return row


def _is_json(line: str) -> bool:
    try:
        _loads(line)
    except ValueError:
        return False
    return True


def _loads(text: str) -> Any:
    return json.loads(text, parse_int=FileNumber, parse_float=FileNumber, parse_constant=FileNumber)
