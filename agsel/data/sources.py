"""Where rows come from: the hub, a folder, a file. Text arrives as it stands in the file."""

from __future__ import annotations

import csv
import glob
import io
import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset, Features, ReadInstruction, load_dataset, load_dataset_builder
from datasets.data_files import DataFilesDict, EmptyDatasetError, get_data_patterns
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
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd", ".bz2": "bz2"}
"""By ending, as Arrow calls them."""
SAVED_TO_DISK = ("state.json", "dataset_dict.json")
"""In the folders of `Dataset.save_to_disk`."""
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
        split_flags: of the command line, likewise.
    """

    name: str
    split: str = "train"
    config: str | None = None
    files: Any = None
    folder: str | None = None
    columns: tuple[str, ...] | None = None
    flag: str = "--dataset_name"
    split_flags: str = "--dataset_train_split, --dataset_test_split"


def complaint(number: int, column: str, what: str) -> UserError:
    """What is wrong with a row."""
    return UserError(f"row {number} of the dataset, column {column}: {what}")


class TypedRows:
    """Rows of a hub dataset or of Parquet files: their columns have types already."""

    def __init__(self, rows: Dataset) -> None:
        self.rows = rows
        self.columns = tuple(rows.column_names)

    def first(self, column: str) -> Any:
        """Of the first row."""
        return self.rows.select_columns([column])[0][column]

    def offered(self, columns: Sequence[str]) -> tuple[str, ...]:
        """Those of the columns that rows have."""
        return tuple(column for column in columns if column in self.columns)

    def convert(self, make: Convert, used: Sequence[str], features: Features) -> Dataset:
        """A row of `features` from the columns used of every row.

        What a row has not got is null in a column with a type: left out.
        """
        return self.rows.select_columns(list(used)).map(
            lambda row, number: make(without_nulls(row), number),
            with_indices=True,
            remove_columns=list(used),
            features=features,
            desc="Reading rows",
        )


class WrittenRows:
    """Rows of JSON or CSV files, read anew as they are written whenever they are asked for."""

    def __init__(self, paths: Sequence[Path], source: Source) -> None:
        self._paths, self._source, self._wanted = list(paths), source, source.columns
        sample = list(itertools.islice(read_files(self._paths), ROWS_SAMPLED))
        self.columns = tuple(dict.fromkeys(column for row in sample for column in row))
        self._first: Row = sample[0] if sample else {}

    def first(self, column: str) -> Any:
        """Of the first row."""
        return self._first.get(column)

    def offered(self, columns: Sequence[str]) -> tuple[str, ...]:
        """Those of the columns that rows may have: some can have what the first ones do not."""
        return tuple(column for column in columns if self._wanted is None or column in self._wanted)

    def convert(self, make: Convert, used: Sequence[str], features: Features) -> Dataset:
        """A row of `features` from the columns used of every row of the split."""
        given = {"stamps": tuple(map(_stamp, self._paths)), "used": tuple(used), "make": make}
        try:
            whole = Dataset.from_generator(_converted, features=features, gen_kwargs=given)
        except DatasetGenerationError as error:
            raise _cause(error) from error
        return _part(whole, self._source)


Rows = TypedRows | WrittenRows


def open_source(source: Source) -> Rows:
    """Look at a dataset.

    Raises:
        UserError: no name, no such dataset, file or split, an unreadable file, or no rows.
    """
    paths = local_files(source)
    if paths is not None and kind_of(paths[0]) in TEXT_FILES:
        rows: Rows = WrittenRows(paths, source)
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
    if not source.name or (source.name in BUILDERS and source.files is None and not Path(source.name).is_dir()):
        raise UserError(f"no dataset: name a hub dataset, a folder or a {', '.join(FILES)} file ({source.flag})")
    path = Path(source.name)
    if source.files is not None:
        return _named_files(source)
    if kind_of(path) or path.is_file():
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
    return _of_one_kind([_readable(path, source) for name in names for path in _expanded(base / name)], source)


def _expanded(path: Path) -> list[Path]:
    """What a pattern such as `part-*.jsonl` stands for, itself if there is no such file."""
    return sorted(map(Path, glob.glob(str(path), recursive=True))) or [path]


def _readable(path: Path, source: Source) -> Path:
    if not path.is_file():
        raise UserError(f"no such file: {path} ({source.flag})")
    if not kind_of(path):
        raise UserError(f"{path} ({source.flag}) has none of the endings {', '.join(FILES)}: give it one")
    if not path.stat().st_size:
        raise UserError(f"{path} is empty ({source.flag})")
    if _split_name(source.split) != "train" and source.files is None:
        raise UserError(
            f"{path} is one file, which has the split train, not {source.split!r} ({source.split_flags}): "
            "train[90%:] is the end of it"
        )
    return path


def _files_in_folder(folder: Path, source: Source) -> list[Path] | None:
    """Those of the split by the names that `datasets` knows, such as train.jsonl and test.jsonl; all of one kind."""
    if any((folder / name).is_file() for name in SAVED_TO_DISK):
        raise UserError(
            f"{folder} was written by save_to_disk ({source.flag}): write a file with to_parquet, and name that"
        )
    by_split = _files_by_split(folder, source)
    wanted = _split_name(source.split)
    if not by_split:
        return None
    if wanted not in by_split:
        raise UserError(
            f"{folder} ({source.flag}) has no files for the split {wanted!r} ({source.split_flags}), only for "
            f"{', '.join(by_split)}"
        )
    return _of_one_kind(by_split[wanted], source)


def _of_one_kind(paths: list[Path], source: Source) -> list[Path]:
    kinds = sorted({kind_of(path) for path in paths})
    if len(kinds) > 1:
        raise UserError(f"{source.name} ({source.flag}) has files of several kinds, {', '.join(kinds)}: name one file")
    return paths


def _files_by_split(folder: Path, source: Source) -> dict[str, list[Path]]:
    """As the README of a folder from the hub lists them, or by their names."""
    base = glob.escape(str(folder.resolve()))
    try:
        if _lists_files(folder / "README.md"):
            found = load_dataset_builder(str(folder), source.config).config.data_files
        else:
            found = DataFilesDict.from_patterns(get_data_patterns(base), base_path=base)
    except EmptyDatasetError as error:
        raise UserError(f"{folder} holds no data files ({source.flag}): it needs {', '.join(FILES)} files") from error
    except Exception as error:  # whatever is wrong with a README
        raise UserError(
            f"cannot tell the files of {folder} ({source.flag}, --dataset_config): {one_line(error)}"
        ) from error
    by_split = {str(split): [Path(path) for path in paths if kind_of(Path(path))] for split, paths in found.items()}
    return {split: paths for split, paths in by_split.items() if paths}


def _lists_files(readme: Path) -> bool:
    return readme.is_file() and any(line.startswith(b"configs:") for line in readme.read_bytes().splitlines())


def _load(source: Source, paths: Sequence[Path] | None) -> Dataset:
    rows = _load_hub(source) if paths is None else _part(_load_parquet(source, paths), source)
    if not len(rows):
        raise UserError(f"{source.name} has no rows in split {source.split!r} ({source.flag}): give it at least one")
    return rows


def _load_parquet(source: Source, paths: Sequence[Path]) -> Dataset:
    try:
        filled = [path for path in paths if pq.read_metadata(path).num_rows]
        if not filled:
            raise UserError(f"{source.name} has no rows ({source.flag}): give it at least one")
        return load_dataset("parquet", data_files=[glob.escape(str(path)) for path in filled], split="train")
    except (DatasetGenerationError, OSError, ValueError) as error:
        if isinstance(error, AgselError):
            raise
        raise UserError(f"cannot read {source.name} ({source.flag}): {one_line(error.__cause__ or error)}") from error


def _load_hub(source: Source) -> Dataset:
    name, split = source.name, source.split
    try:
        return load_dataset(name, source.config, data_dir=source.folder, data_files=source.files, split=split)
    except DatasetGenerationError as error:
        raise UserError(f"cannot read {name} ({source.flag}): {one_line(error.__cause__ or error)}") from error
    except (ValueError, RuntimeError) as error:
        raise UserError(
            f"cannot load {name} ({source.flag}), split {split!r} ({source.split_flags}; "
            f"train[90%:] is the end of train): {one_line(error)}"
        ) from error
    except OSError as error:
        raise UserError(
            f"cannot find or reach the dataset {name} ({source.flag}): {one_line(error)}; correct the name, or give a "
            "file"
        ) from error


def _split_name(split: str) -> str:
    return split.partition("[")[0]


def _part(whole: Dataset, source: Source) -> Dataset:
    """The rows of a split expression, which names one split."""
    split, name = source.split, _split_name(source.split)
    try:
        parts = ReadInstruction.from_spec(split).to_absolute({name: len(whole)})
    except (ValueError, AssertionError) as error:
        raise UserError(
            f"{split!r} is no part of {name} ({source.split_flags}): write train[90%:] or "
            f"train[:1000] ({one_line(error)})"
        ) from error
    chosen = [index for part in parts for index in range(part.from_ or 0, len(whole) if part.to is None else part.to)]
    if not chosen:
        raise UserError(f"{split!r} has no rows ({source.split_flags}): there are {len(whole)}")
    return whole if len(chosen) == len(whole) else whole.select(chosen)


def _stamp(path: Path) -> tuple[str, int, int, int]:
    """Another one, and `datasets` does not go on giving what was in a file before."""
    state = path.stat()
    return str(path.resolve()), state.st_size, state.st_mtime_ns, state.st_ctime_ns


def _converted(stamps: Sequence[tuple[str, int, int, int]], used: Sequence[str], make: Convert) -> Iterator[Row]:
    for number, row in enumerate(read_files([Path(path) for path, *_ in stamps])):
        yield make({column: row[column] for column in used if column in row}, number)


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
            with _open(path) as file:
                yield from _read_table(file, path, DELIMITERS[kind]) if kind in DELIMITERS else _read_json(file, path)
        except UnicodeDecodeError as error:
            raise UserError(f"cannot read {path}: {error}; save it as UTF-8") from error
        except (OSError, EOFError, ValueError) as error:
            if isinstance(error, AgselError):
                raise
            raise UserError(f"cannot read {path}: {one_line(error)}") from error


def _open(path: Path) -> IO[str]:
    content = pa.input_stream(str(path), compression=COMPRESSIONS.get(path.suffix.lower()), buffer_size=2**16)
    return io.TextIOWrapper(content, encoding="utf-8-sig", newline="")


def _read_table(file: IO[str], path: Path, delimiter: str) -> Iterator[Row]:
    csv.field_size_limit(2**31 - 1)
    reader = csv.reader(file, delimiter=delimiter, strict=True)
    try:
        yield from _read_lines(filter(None, reader), path)
    except csv.Error as error:
        raise UserError(
            f"cannot read {path}, line {reader.line_num}: {error}; put text with quotes in quotes, and double its own"
        ) from error


def _read_lines(lines: Iterator[list[str]], path: Path) -> Iterator[Row]:
    header = next(lines, [])
    twice = next((name for name in filter(None, header) if header.count(name) > 1), None)
    if twice is not None:
        raise UserError(f"{path} has the column {twice!r} twice: rename one of both")
    for number, values in enumerate(lines):
        if len(values) != len(header):
            raise UserError(
                f"row {number} of {path} has {len(values)} fields, its first line names {len(header)}: correct it, or "
                "put text with a delimiter or a line break in quotes"
            )
        yield {name: value for name, value in zip(header, values, strict=True) if name}


def _read_json(file: IO[str], path: Path) -> Iterator[Row]:
    """One row a line, or one list of rows."""
    first = next((line for line in file if line.strip()), None)
    if first is None:
        return
    if first.lstrip().startswith("[") or not _is_json(first):
        yield from _read_json_list(first + file.read(), path)
        return
    for number, line in enumerate(line for line in itertools.chain([first], file) if line.strip()):
        try:
            row = _loads(line)
        except ValueError as error:
            raise UserError(f"cannot read {path}: row {number} is no JSON, {_fault(error)}: correct it") from error
        yield _require_object(row, number, path)


def _read_json_list(text: str, path: Path) -> Iterator[Row]:
    rows = _loads(text)
    if not isinstance(rows, list):
        raise UserError(f"cannot read {path}: it holds {kind_name(rows)}; write a list of rows, or one row a line")
    for number, row in enumerate(rows):
        yield _require_object(row, number, path)


def _require_object(row: Any, number: int, path: Path) -> Row:
    if not isinstance(row, dict):
        raise UserError(f"cannot read {path}: row {number} is no JSON object, but {kind_name(row)}")
    return row


def _is_json(line: str) -> bool:
    try:
        _loads(line)
    except ValueError:
        return False
    return True


def _fault(error: ValueError) -> str:
    """Of a row: what is wrong, without the line of it that the decoder counts."""
    return f"{error.msg} at its character {error.pos}" if isinstance(error, json.JSONDecodeError) else str(error)


def _loads(text: str) -> Any:
    try:
        return json.loads(text, parse_int=FileNumber, parse_float=FileNumber, parse_constant=FileNumber)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
