"""Where rows come from: every kind of file, text as it stands there, and what cannot be read, in one line."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from datasets import Dataset
from datasets.exceptions import DatasetNotFoundError

from agsel.data.fields import Fields
from agsel.data.formats import read_rows
from agsel.data.sources import FileNumber, Source, kind_of, local_files, read_files
from agsel.data.values import as_text, plain, without_nulls
from agsel.errors import UserError

MAPPED = Fields(prompt_field="question", completion_field="answer")
LINES = '{"question": "a", "answer": "b"}\n{"question": "c, d", "answer": "é\u2028f"}\n'
LIST = '[\n{"question": "a", "answer": "b"},\n{"question": "c, d", "answer": "é\u2028f"}]'
COMMAS = 'question,answer\na,b\n"c, d",é\u2028f\n'
TABS = "question\tanswer\na\tb\nc, d\té\u2028f\n"
PAIRS = [("a", "b"), ("c, d", "é\u2028f")]

CONTENTS: dict[str, str] = {
    "rows.jsonl": LINES,
    "rows.json": LIST,
    "lines.json": LINES,
    "list.jsonl": LIST,
    "ROWS.JSONL": LINES,
    "rows.Csv": COMMAS,
    "rows.tsv": TABS,
    "my.data v1.2.jsonl": LINES,
    "rows[1].jsonl": LINES,
    "blank lines.jsonl": "\n\n" + LINES.replace("\n", "\n  \n"),
    "no last line break.csv": COMMAS.rstrip("\n"),
    "blank lines.csv": "\n" + COMMAS.replace("\n", "\n\n"),
    "no name.csv": 'question,,answer,\na,1,b,\n"c, d",2,é\u2028f,\n',
}


def write(path: Path, text: str | bytes, compression: str | None = None) -> Path:
    with pa.output_stream(str(path), compression=compression) as file:
        file.write(text.encode() if isinstance(text, str) else text)
    return path


def texts(name: object, fields: Fields = MAPPED, **options: Any) -> list[tuple[str, str]]:
    rows, _ = read_rows(Source(str(name), **options), fields)
    return list(zip(rows["prompt"], rows["completion"], strict=True))


def refuse(read: Callable[[], object], *words: str) -> None:
    with pytest.raises(UserError) as refusal:
        read()
    for part in words:
        assert part in str(refusal.value)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("name", CONTENTS)
def test_a_file_is_read_by_its_ending(tmp_path: Path, name: str) -> None:
    assert texts(write(tmp_path / name, CONTENTS[name])) == PAIRS


@pytest.mark.parametrize("altered", ["bom", "crlf"])
@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "rows.Csv", "rows.tsv"])
def test_what_other_systems_write_is_read_alike(tmp_path: Path, name: str, altered: str) -> None:
    text = CONTENTS[name]
    text = f"\ufeff{text}" if altered == "bom" else text.replace("\n", "\r\n")
    assert texts(write(tmp_path / name, text)) == PAIRS


@pytest.mark.parametrize(
    ("ending", "compression"), [(".gz", "gzip"), (".GZ", "gzip"), (".zst", "zstd"), (".bz2", "bz2")]
)
@pytest.mark.parametrize("name", ["rows.jsonl", "rows.csv"])
def test_a_compressed_file_is_read_too(tmp_path: Path, name: str, ending: str, compression: str) -> None:
    text = {"rows.jsonl": LINES, "rows.csv": COMMAS}[name]
    assert texts(write(tmp_path / f"{name}{ending}", text, compression)) == PAIRS


def test_compressed_parts_in_one_file_are_all_read(tmp_path: Path) -> None:
    first, second = (write(tmp_path / str(number), LINES, "gzip").read_bytes() for number in range(2))
    assert texts(write(tmp_path / "rows.jsonl.gz", first + second)) == PAIRS * 2


def parquet(path: Path, pairs: list[tuple[Any, Any]] = PAIRS) -> Path:
    Dataset.from_dict({"question": [one for one, _ in pairs], "answer": [two for _, two in pairs]}).to_parquet(path)
    return path


@pytest.mark.parametrize("name", ["rows.parquet", "ROWS.PARQUET", "rows[1].parquet"])
def test_parquet_is_read(tmp_path: Path, name: str) -> None:
    assert texts(parquet(tmp_path / name)) == PAIRS


def test_a_part_of_a_file_is_read(tmp_path: Path) -> None:
    lines = "".join(f'{{"question": "{number}", "answer": "b"}}\n' for number in range(10))
    path = write(tmp_path / "rows.jsonl", lines)
    for source in (path, parquet(tmp_path / "rows.parquet", [(str(number), "b") for number in range(10)])):
        for split, numbers in {"train[80%:]": "89", "train[:2]": "01", "train[1:2]+train[8:]": "189"}.items():
            assert "".join(prompt for prompt, _ in texts(source, split=split)) == numbers
        refuse(partial(texts, source, split="train[5:5]"), "'train[5:5]' has no rows (--dataset_train_split")
        refuse(partial(texts, source, split="train[5:"), "(--dataset_train_split, --dataset_test_split)", "train[90%:]")
        refuse(partial(texts, source, split="train[5:5]", split_flags="--split"), "'train[5:5]' has no rows (--split)")
        refuse(partial(texts, source, split="test"), f"{source} is one file, which has the split train, not 'test'")


AS_WRITTEN: dict[str, tuple[str, str, list[str]]] = {
    "date": ("rows.jsonl", '"2024-01-02"', ["2024-01-02"]),
    "time": ("rows.jsonl", '"2024-01-02T03:04:05Z"', ["2024-01-02T03:04:05Z"]),
    "number and another": ("rows.jsonl", "1|2.5", ["1", "2.5"]),
    "big number": ("rows.jsonl", "12345678901234567890|0.1", ["12345678901234567890", "0.1"]),
    "spelling of numbers": ("rows.jsonl", "1.50|1e3|-0|NaN", ["1.50", "1e3", "-0", "NaN"]),
    "truth values": ("rows.jsonl", 'true|"True"|false', ["true", "True", "false"]),
    "number and text": ("rows.jsonl", '5|"five"', ["5", "five"]),
    "words for nothing": ("rows.csv", "NA|null|None|nan|N/A", ["NA", "null", "None", "nan", "N/A"]),
    "leading zeros": ("rows.csv", "007|1.0|+5|1_000", ["007", "1.0", "+5", "1_000"]),
    "truth values in a table": ("rows.csv", "true|TRUE|2024-01-02", ["true", "TRUE", "2024-01-02"]),
    "space": ("rows.csv", '" a "| b|"c\nd"', [" a ", " b", "c\nd"]),
    "line breaks": ("rows.csv", '"a\r\nb"|"c\rd"', ["a\r\nb", "c\rd"]),
    "quotes": ("rows.csv", '"say ""a"""|don\'t', ['say "a"', "don't"]),
    "escapes": ("rows.jsonl", r'"a\nb"|"\u00e9\ud83d\ude00"', ["a\nb", "é😀"]),
    "unicode": ("rows.tsv", "日本\u00a0語|e\u0301", ["日本\u00a0語", "e\u0301"]),
}


@pytest.mark.parametrize("name", AS_WRITTEN)
def test_text_arrives_as_it_stands_in_the_file(tmp_path: Path, name: str) -> None:
    file, values, expected = AS_WRITTEN[name]
    row, head = {".jsonl": ('{"answer": %s}\n', ""), ".csv": ("%s\n", "answer\n"), ".tsv": ("%s\n", "answer\n")}[
        kind_of(Path(file))
    ]
    path = write(tmp_path / file, head + "".join(row % value for value in values.split("|")))
    assert [
        completion for _, completion in texts(path, Fields(prompt_template="", completion_field="answer"))
    ] == expected


def test_lists_and_objects_in_templates_keep_the_spelling_of_their_numbers(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", '{"a": [1.50, {"b": 12345678901234567890, "ü": null}, true, "x\\"y"]}\n')
    expected = '1.50 [1.50, {"b": 12345678901234567890, "ü": null}, true, "x\\"y"] 1.500'
    assert texts(path, Fields(prompt_template="", completion_template="{a[0]} {a} {a[0]:.3f}")) == [("", expected)]


def test_values_of_files_as_text_and_as_numbers() -> None:
    assert [as_text(value) for value in (None, True, 1.0, [None], "x")] == ["", "true", "1.0", "[null]", "x"]
    assert plain({"a": [FileNumber("-12"), FileNumber("1e3"), "5"]}) == {"a": [-12, 1000.0, "5"]}
    assert without_nulls([{"a": None, "b": [None, {"c": None}]}]) == [{"b": [None, {}]}]


def test_a_very_long_row_is_read_whole(tmp_path: Path) -> None:
    long = "ab " * 1_000_000
    assert texts(write(tmp_path / "rows.csv", f"question,answer\nq,{long}\n")) == [("q", long)]


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.parquet"])
def test_a_file_that_has_changed_is_read_anew(tmp_path: Path, name: str) -> None:
    """Also of the same size and with its old time: `datasets` keeps what it has read."""
    path = tmp_path / name
    for answer in "bc":
        if name == "rows.parquet":
            path.unlink(missing_ok=True)
            parquet(path, [("a", answer)])
        else:
            write(path, f'{{"question": "a", "answer": "{answer}"}}\n')
            os.utime(path, (1, 1))
        assert texts(path) == [("a", answer)]


UNREADABLE: dict[str, tuple[str, str | bytes, tuple[str, ...]]] = {
    "nothing": ("rows.jsonl", "", ("is empty (--dataset_name)",)),
    "only space": ("rows.jsonl", " \n\n", ("has no rows (--dataset_name): give it at least one",)),
    "empty list": ("rows.json", "[]", ("has no rows (--dataset_name)",)),
    "empty object": ("rows.jsonl", "{}\n", ("has no rows",)),
    "only names": ("rows.csv", "question,answer\n", ("has no rows (--dataset_name)",)),
    "broken JSON": ("rows.json", '{"question": \n', ("cannot read", "rows.json: Expecting value: line 2 column 1")),
    "broken later": (
        "rows.jsonl",
        LINES + '{"question": ',
        ("rows.jsonl: row 2 is no JSON, Expecting value at its character 13: correct it",),
    ),
    "an object": ("rows.json", '{\n"data": []}', ("it holds an object; write a list of rows, or one row a line",)),
    "a list of texts": ("rows.json", '["a"]', ("row 0 is no JSON object, but text",)),
    "a text": ("rows.jsonl", LINES + '"a"\n', ("row 2 is no JSON object, but text",)),
    "nested deeply": ("rows.jsonl", LINES + "[" * 100_000 + "\n", ("row 2 is no JSON, it is nested too deeply",)),
    "all nested deeply": ("rows.json", "[" * 100_000, ("cannot read", "it is nested too deeply")),
    "other encoding": ("rows.csv", "question,answer\na,é".encode("latin-1"), ("rows.csv: 'utf-8' codec", "save it as")),
    "UTF-16": ("rows.jsonl", LINES.encode("utf-16"), ("rows.jsonl: 'utf-8' codec", "save it as UTF-8")),
    "few fields": (
        "rows.csv",
        "question,answer\na,b\nc\n",
        ("row 1 of ", "has 1 fields, its first line names 2: corr"),
    ),
    "many fields": ("rows.csv", "question,answer\na,b,c\n", ("row 0 of ", "has 3 fields, its first line names 2")),
    "name twice": (
        "rows.csv",
        "question,answer,answer\na,b,c\n",
        ("has the column 'answer' twice: rename one of both",),
    ),
    "open quote": ("rows.csv", 'question,answer\na,"b\n', ("rows.csv, line 2: unexpected end of data; put text with",)),
    "stray quote": ("rows.csv", 'question,answer\na,"b" c\n', ("rows.csv, line 2: ',' expected after '\"'",)),
    "no gzip": ("rows.jsonl.gz", LINES, ("cannot read", "rows.jsonl.gz: ")),
    "no zstandard": ("rows.jsonl.zst", LINES, ("cannot read", "rows.jsonl.zst: ")),
    "no parquet": ("rows.parquet", LINES, ("cannot read", "rows.parquet (--dataset_name): ")),
}


@pytest.mark.parametrize("name", UNREADABLE)
def test_a_file_that_cannot_be_read_is_refused_by_name(tmp_path: Path, name: str) -> None:
    file, content, words = UNREADABLE[name]
    path = tmp_path / file
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    refuse(partial(texts, path), str(path), *words)


def test_compressed_files_without_an_end_or_a_row_are_refused(tmp_path: Path) -> None:
    whole = write(tmp_path / "whole", LINES, "gzip").read_bytes()
    refuse(partial(texts, write(tmp_path / "cut.jsonl.gz", whole[:-20])), "cannot read", "cut.jsonl.gz: ")
    refuse(
        partial(texts, write(tmp_path / "empty.jsonl.gz", "", "gzip")), "empty.jsonl.gz has no rows (--dataset_name)"
    )


def test_tables_without_rows_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    Dataset.from_dict({"question": [], "answer": []}).to_parquet(path)
    refuse(partial(texts, path), f"{path} has no rows (--dataset_name): give it at least one")


@pytest.mark.parametrize("name", [None, "", "json", "parquet"])
def test_a_dataset_must_be_named(name: str | None) -> None:
    refuse(lambda: local_files(Source(name)), "no dataset: name a hub dataset, a folder or a .json", "(--dataset_name)")  # type: ignore[arg-type]


def test_a_file_that_is_not_there_is_refused() -> None:
    refuse(partial(texts, "missing.jsonl"), "no such file: missing.jsonl (--dataset_name)")


def folder(path: Path, **files: str) -> Path:
    """With files, whose names have `__` for a dot."""
    path.mkdir()
    for name, content in files.items():
        (path / name.replace("__", ".")).write_text(content)
    return path


def test_a_folder_has_its_files_by_split(tmp_path: Path) -> None:
    whole = folder(tmp_path / "data [1]", train__jsonl=LINES, test__jsonl=LINES * 2, README__md="# Data", x__txt="x")
    assert texts(whole) == PAIRS
    assert texts(whole, split="test") == PAIRS * 2
    assert texts(whole, split="test[3:]") == PAIRS[1:]
    refuse(partial(texts, whole, split="dev"), "has no files for the split 'dev' (--dataset_train_split", "train, test")
    assert texts(folder(tmp_path / "two", train_1__csv=COMMAS, train_2__csv=COMMAS)) == PAIRS * 2
    assert texts(folder(tmp_path / "packed", other__csv=COMMAS)) == PAIRS


def test_a_folder_from_the_hub_has_its_files_as_its_readme_lists_them(tmp_path: Path) -> None:
    listed = "---\nconfigs:\n- config_name: %s\n  data_files:\n  - split: train\n    path: b.jsonl\n---\n"
    whole = folder(tmp_path / "listed", a__jsonl="{}", b__jsonl=LINES, README__md=listed % "default")
    assert texts(whole) == PAIRS
    assert texts(folder(tmp_path / "named", b__jsonl=LINES, README__md=listed % "main"), config="main") == PAIRS
    refuse(partial(texts, whole, config="other"), f"cannot tell the files of {whole}", "--dataset_config", "other")


def test_folders_that_cannot_be_read_are_refused(tmp_path: Path) -> None:
    refuse(partial(texts, folder(tmp_path / "empty")), "empty holds no data files (--dataset_name): it needs .json")
    mixed = folder(tmp_path / "mixed", train_1__jsonl=LINES, train_2__csv=COMMAS)
    refuse(partial(texts, mixed), f"{mixed} (--dataset_name) has files of several kinds, .csv, .jsonl: name one file")
    Dataset.from_dict({"question": ["a"], "answer": ["b"]}).save_to_disk(tmp_path / "saved")
    refuse(partial(texts, tmp_path / "saved"), "was written by save_to_disk (--dataset_name): write a file with to_par")


def test_files_are_named_one_by_one_or_by_a_pattern(tmp_path: Path) -> None:
    whole = folder(tmp_path / "data", one__jsonl=LINES, two__jsonl=LINES, three__csv=COMMAS)
    assert texts("json", files=[str(whole / "one.jsonl"), str(whole / "t*.jsonl")]) == PAIRS * 2
    assert texts(whole, files="one.jsonl") == PAIRS
    assert texts(whole, files={"train": "*.jsonl", "test": ["one.jsonl"]}) == PAIRS * 2
    assert texts(whole, files={"train": "*.jsonl", "test": ["one.jsonl"]}, split="test") == PAIRS
    assert texts(whole, files="three.csv", split="test") == PAIRS
    refuse(
        partial(texts, whole, files={"train": "one.jsonl"}, split="test"), "data_files has nothing for the split 'te"
    )
    refuse(partial(texts, whole, files="n*.jsonl"), f"no such file: {whole}/n*.jsonl")
    refuse(
        partial(texts, whole, files=["one.jsonl", "three.csv"]), "has files of several kinds, .csv, .jsonl: name one"
    )
    refuse(partial(texts, whole, files=["one.jsonl", "nine.jsonl"]), f"no such file: {whole}/nine.jsonl")
    (whole / "notes").write_text("x")
    refuse(partial(texts, write(tmp_path / "rows.xlsx", "x")), "rows.xlsx (--dataset_name) has none of the endings")
    refuse(partial(texts, whole, files="notes"), f"{whole}/notes (--dataset_name) has none of the endings .json, ")


def test_only_the_columns_that_are_wanted_are_there(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", LINES)
    rows = (path, parquet(tmp_path / "rows.parquet"))
    for source in rows:
        refuse(
            partial(texts, source, columns=("question",)), "no column 'answer' (--completion_field): it has question"
        )
        refuse(partial(texts, source, columns=("question", "anwser")), "has no column 'anwser' (datasets: columns)")


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (
            DatasetNotFoundError("no such dataset"),
            "cannot find or reach the dataset openai/gsm8k (--dataset_name): no s",
        ),
        (
            ConnectionError("offline"),
            "cannot find or reach the dataset openai/gsm8k (--dataset_name): offline; correct",
        ),
        (
            ValueError('Unknown split "test".'),
            "cannot load openai/gsm8k (--dataset_name), split 'train' (--dataset_trai",
        ),
        (RuntimeError("Dataset scripts are no longer supported"), "cannot load openai/gsm8k (--dataset_name)"),
    ],
)
def test_a_hub_dataset_that_cannot_be_had_is_refused_by_name(
    error: Exception, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("agsel.data.sources.load_dataset", fail)
    refuse(partial(texts, "openai/gsm8k"), words, str(error))


def test_a_hub_dataset_is_asked_for_as_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def give(*arguments: object, **options: object) -> Dataset:
        asked.extend([*arguments, options])
        return Dataset.from_dict({"question": ["a"], "answer": ["b"]})

    monkeypatch.setattr("agsel.data.sources.load_dataset", give)
    assert texts("openai/gsm8k", split="train[:1]", config="main", folder="x") == [("a", "b")]
    assert asked == ["openai/gsm8k", "main", {"data_dir": "x", "data_files": None, "split": "train[:1]"}]


def test_rows_of_several_files_follow_each_other(tmp_path: Path) -> None:
    paths = [write(tmp_path / "a.csv", COMMAS), write(tmp_path / "b.jsonl", LINES)]
    assert [(row["question"], row["answer"]) for row in read_files(paths)] == PAIRS * 2
