"""tools/quality/problems.py: every sum is right and stands in one file only; the same settings give the same bytes."""

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest

from agsel.evaluation.answers import GSM8K
from tests.distributed import REPOSITORY
from tools.quality import problems

MEANINGS = {
    "add": r"(?:buys|finds|wins) (\d+) more",
    "subtract": r"(?:gives away|loses|sells) (\d+)",
    "multiply": r"(\d+) times as many",
    "divide": r"among (\d+) people and keeps one|one of (\d+) equal piles",
}
"""How people read the events; the program's own table is not asked."""
ALL = ("add", "subtract", "multiply", "divide")

Rows = dict[str, list[dict[str, str]]]


def write(folder: Path, *words: str) -> tuple[int, str]:
    command = [sys.executable, REPOSITORY / "tools/quality/problems.py", "--output", str(folder), *words]
    done = subprocess.run(command, capture_output=True, text=True)
    return done.returncode, done.stderr


def read(folder: Path) -> Rows:
    files = sorted(folder.glob("*.jsonl"))
    return {path.stem: list(map(json.loads, path.read_text().splitlines())) for path in files}


def as_asked(question: str) -> tuple[int, list[tuple[str, int]]]:
    """The first number, and operation and number of each event, read from the words."""
    start = int(re.search(r"has (\d+)", question).group(1))  # type: ignore[union-attr]
    story = question.split(". First ")[1]
    found = [
        (match.start(), operation, int(next(filter(None, match.groups()))))
        for operation, meaning in MEANINGS.items()
        for match in re.finditer(meaning, story)
    ]
    return start, [(operation, number) for _, operation, number in sorted(found)]


def totals(start: int, steps: list[tuple[str, int]]) -> Iterator[int]:
    total = start
    yield total
    for operation, number in steps:
        if operation == "divide":
            assert total % number == 0
        total = {
            "add": total + number,
            "subtract": total - number,
            "multiply": total * number,
            "divide": total // number,
        }[operation]
        assert total >= 1
        yield total


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Rows:
    folder = tmp_path_factory.mktemp("problems")
    assert write(folder, "--operations", *ALL) == (0, "")
    return read(folder)


def test_both_steps_and_the_marked_answer_are_right(rows: Rows) -> None:
    for row in [row for of_file in rows.values() for row in of_file]:
        start, steps = as_asked(row["question"])
        assert 100 <= start <= 999
        assert len(steps) == 2
        right = list(totals(start, steps))
        *lines, marked = row["answer"].split("\n")
        for line, (before, after), (operation, number) in zip(lines, pairwise(right), steps, strict=True):
            sign = dict(zip(ALL, "+-*/", strict=True))[operation]
            assert f" {before} {sign} {number} = {after} " in line
        assert marked == f"#### {right[-1]}"
        assert GSM8K.is_right(row["answer"], f"#### {right[-1]}")


def test_every_operation_is_met_and_no_sum_stands_twice(rows: Rows) -> None:
    sums = [str(as_asked(row["question"])) for of_file in rows.values() for row in of_file]
    assert {stem: len(of_file) for stem, of_file in rows.items()} == {"train": 6000, "validation": 500, "test": 1000}
    assert len(set(sums)) == len(sums)
    assert all(sum(operation in text for text in sums) > 1000 for operation in ALL)


def test_the_same_settings_give_the_same_bytes_and_other_training_rows_leave_the_judged_ones(tmp_path: Path) -> None:
    few = ("--validation_rows", "20", "--test_rows", "20")
    for name, words in {"one": (), "same": (), "fewer": ("--train_rows", "50"), "seed": ("--seed", "1")}.items():
        assert write(tmp_path / name, "--train_rows", "80", *few, *words) == (0, "")
    one, same, fewer, seed = (read(tmp_path / name) for name in ("one", "same", "fewer", "seed"))
    assert one == same
    assert (one["test"], one["validation"]) == (fewer["test"], fewer["validation"])
    assert one["train"][:50] == fewer["train"]
    assert one["test"] != seed["test"]


def test_difficulty_is_a_setting(tmp_path: Path) -> None:
    words = ("--digits", "2", "--operations", "subtract", "--train_rows", "100", "--validation_rows", "9")
    assert write(tmp_path, *words) == (0, "")
    for row in [row for of_file in read(tmp_path).values() for row in of_file]:
        start, steps = as_asked(row["question"])
        assert 10 <= start <= 99
        assert all(number <= 99 for _, number in steps)
    subtracted = [operation for row in read(tmp_path)["test"] for operation, _ in as_asked(row["question"])[1]]
    assert subtracted.count("subtract") > 0.9 * len(subtracted)


def test_more_rows_than_there_are_problems_are_refused(tmp_path: Path) -> None:
    code, said = write(tmp_path / "none", "--digits", "1", "--operations", "subtract")
    assert code == 1
    assert "different problems of this kind" in said
    assert "raise --digits, or lower --train_rows" in said
    assert not (tmp_path / "none").exists()
    assert len(problems.draw_problems(100, 1, ["subtract"], problems.random.Random(0))) == 100
