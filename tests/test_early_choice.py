"""tools/quality/early_choice.py: what a part of a batch chooses, beside the whole of it."""

from pathlib import Path

import pytest

from tests.tiny import tiny_model
from tests.tiny_run import save_model, save_rows
from tools.quality import early_choice
from tools.quality.folding import Row, batch_of, batches_of

ROWS = [Row([5, 6, 7, 8], 2), *[Row([5, 6, 7, 8, 9, 10], 3)] * 3]


def test_likeness_counts_the_common_layers_and_weighs_them_by_the_whole_batch() -> None:
    assert early_choice.likeness([3, 2, 1], [1, 2, 4], 1) == (0, 1 / 16)
    assert early_choice.likeness([3, 2, 1], [1, 2, 4], 2) == (1, 5 / 20)
    assert early_choice.likeness([1, 2, 4], [1, 2, 4], 2) == (2, 1.0)


def test_after_the_last_micro_batch_the_norms_are_those_of_all_rows() -> None:
    parts, whole = tiny_model(), tiny_model()
    norms = early_choice.step_norms(parts, batches_of(ROWS, 1))
    (expected,) = early_choice.step_norms(whole, [batch_of(ROWS)])
    assert len(norms) == 4
    assert norms[-1] == pytest.approx(expected, rel=1e-5)
    assert norms[0] != pytest.approx(expected, rel=0.1)


def test_every_step_has_a_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = save_rows(tmp_path / "rows.jsonl", 9)
    words = ["--model", str(save_model(tmp_path / "model")), "--rows", str(rows), "--micro_batch", "1"]
    early_choice.main([*words, "--accumulation", "2", "--steps", "3"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" | ")[0] for line in lines[2:]] == ["| 0", "| 1", "| 2", "| mean"]
    with pytest.raises(SystemExit, match=r"rows\.jsonl has 9 rows of the 10 that are needed: lower --steps"):
        early_choice.main([*words, "--accumulation", "2", "--steps", "5"])
    with pytest.raises(SystemExit, match="--accumulation is 1"):
        early_choice.main([*words, "--accumulation", "1"])
