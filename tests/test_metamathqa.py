"""tools/quality/metamathqa.py and the plan beside it: PEFT's rows, beginnings of its texts, its marks of an answer."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from agsel.evaluation.answers import judge_by_pattern
from tests.distributed import REPOSITORY
from tools.comparison.plan import Run
from tools.comparison.plan_file import read_plan
from tools.quality import metamathqa

RESPONSE = "He has 3 + 4 = 7 dollars.\n#### 7\nThe answer is: 7"


def row(characters: int, **columns: str) -> dict[str, str]:
    """A row whose query and response have as many characters, the space between them included."""
    return {"query": "q" * (characters - len(f" {RESPONSE}")), "response": RESPONSE, **columns}


def write(folder: Path, *words: object) -> tuple[int, str]:
    command = [sys.executable, str(REPOSITORY / "tools/quality/metamathqa.py"), str(folder), *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True)
    return done.returncode, done.stderr.strip()


def test_the_first_rows_that_are_short_enough_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metamathqa, "ROWS", 2)
    rows = [row(1301), row(1300), row(99), row(98)]
    assert list(metamathqa.rows_to_train(rows)) == [row(1300), row(99)]


def test_the_text_has_the_beginnings_of_the_first_articles() -> None:
    articles = [{"text": f"{number} " * 3000} for number in range(200)]
    parts = metamathqa.text_of(articles).split("\n\n")
    assert len(parts) == 100
    assert all(len(part) <= 3000 and part.startswith(f"{number} ") for number, part in enumerate(parts))


def test_files_are_read_and_written(tmp_path: Path) -> None:
    (tmp_path / "rows.json").write_text(json.dumps([row(99, type="GSM_SV"), row(2000), row(98, type="MATH_FOBAR")]))
    (tmp_path / "articles.jsonl").write_text(json.dumps({"id": 1, "text": "Zürich is a town."}) + "\n")
    files = ("--rows", tmp_path / "rows.json", "--articles", tmp_path / "articles.jsonl")
    assert write(tmp_path / "data", *files) == (0, "")
    lines = (tmp_path / "data/train.jsonl").read_text().splitlines()
    assert list(map(json.loads, lines)) == [row(99), row(98)]
    assert (tmp_path / "data/text.txt").read_text(encoding="utf-8") == "Zürich is a town."


def test_rows_with_other_columns_are_refused_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"question": "1 + 1?", "answer": "2"}\n')
    code, said = write(tmp_path / "data", "--rows", tmp_path / "rows.jsonl")
    assert (code, said) == (1, "there is no column 'query': --rows needs query and response, --articles text")


@pytest.mark.parametrize(
    ("generated", "is_right"),
    [
        (RESPONSE, True),
        ("#### 7", True),
        ("The final answer is $7.00.", True),
        ("The answer is: 7%\n\nQuestion: and then?", True),
        ("The answer is: 7\nQuestion: more?\nAnswer: The answer is: 8", False),
        ("The answer is: 1,007", False),
        ("The answer is: 7 dollars", False),
        ("It is 7", False),
    ],
)
def test_the_plan_reads_answers_behind_their_marks(generated: str, is_right: bool) -> None:
    plan = read_plan(REPOSITORY / "tools/quality/metamathqa.yaml")
    judge = judge_by_pattern(plan.evaluation_of(Run("full", 1e-5), "test")["answer_pattern"])
    assert judge.has_answer("3 + 4 = <<3+4=7>>7\n#### 7")
    assert judge.is_right(generated, "3 + 4 = <<3+4=7>>7\n#### 7") is is_right
    assert judge.is_right("The answer is: 1000", "#### 1,000")
