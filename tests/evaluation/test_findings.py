"""Results as they are written and shown."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from agsel.evaluation.findings import as_lines, print_results, summarise_text, write_complete


def test_a_row_is_one_line_whatever_its_text_holds() -> None:
    rows = [{"generated": "a\u2028b\x85c\nd\re", "correct": True}, {"generated": "ü"}]
    assert [json.loads(line) for line in as_lines(rows).splitlines()] == rows


def test_what_predicts_nothing_has_a_loss_that_is_no_number() -> None:
    numbers = summarise_text([{"completion_tokens": 0, "loss": 0.0}])
    assert math.isnan(numbers["text_nll"])


def test_results_are_shown_one_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    print_results({"rows": 3, "nll": 0.123456, "tasks": {"gsm8k": {"accuracy": 0.5}}})
    assert [line.split() for line in capsys.readouterr().out.splitlines()] == [
        ["rows", "3"],
        ["nll", "0.1235"],
        ["tasks"],
        ["gsm8k"],
        ["accuracy", "0.5000"],
    ]


def test_a_file_that_cannot_be_written_keeps_what_it_was(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    write_complete(path, "old")
    (tmp_path / ".results.json.new").mkdir()
    with pytest.raises(ValueError, match="--output"):
        write_complete(path, "new")
    assert path.read_text() == "old"
