"""The way of a run to its first step, and tools/bench_start.py, which times it. Times themselves are not tested."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from datasets import Dataset

from agsel.data.formats import ROW_NUMBER
from agsel.errors import UserError
from agsel.monitor import status_line
from agsel.training.data import require_labels
from agsel.training.identity import fingerprint_of_rows
from tests.distributed import REPOSITORY, environment
from tests.tiny_run import TRAIN
from tools.bench import start

COLLECTING = f"""
import gc, runpy, sys
import agsel.train
agsel.train.main = lambda words: sys.exit(f"on {{gc.isenabled()}}, frozen {{gc.get_freeze_count() > 100_000}}")
runpy.run_path({str(TRAIN)!r}, run_name="__main__")
"""


def test_garbage_is_collected_as_soon_as_all_is_imported() -> None:
    """And not what is imported, of which there are several hundred thousand objects."""
    done = subprocess.run(
        [sys.executable, "-c", COLLECTING], env=environment(), cwd=REPOSITORY, capture_output=True, text=True
    )
    assert done.stderr.splitlines()[-1] == "on True, frozen True"


def test_rows_are_recognised_however_they_are_read() -> None:
    """As they were noted in checkpoints when rows were read one by one."""
    rows = Dataset.from_dict({"input_ids": [[1, 2], [3], []], "text": ["a", None, "ü"], "learnt": [True, False, True]})
    assert fingerprint_of_rows(rows) == "3 rows (0a460622)"
    many = Dataset.from_dict({"number": list(range(4321))}).select(range(4000, 0, -1))
    assert fingerprint_of_rows(many) == "4000 rows (bbea0822)"


def test_the_row_without_labels_is_named_among_selected_rows() -> None:
    rows = Dataset.from_dict({ROW_NUMBER: list(range(9))}).select([8, 6, 4, 2])
    require_labels(rows.select([3, 2, 1, 0]), rows, 16)
    with pytest.raises(UserError, match=r"^row 4 of the dataset has no label left, .* \(2 of 4 rows\)"):
        require_labels(rows.select([0, 3]), rows, 16)


@pytest.mark.parametrize(
    ("line", "is_first"),
    [
        (status_line(1, 300, {"loss": 2.0}, "", None), True),
        (status_line(10, 300, {"loss": 2.0}, "", None), False),
        ("{'loss': '4.197', 'grad_norm': '3.1', 'epoch': '0.01'}", True),
        ("  0%|          | 0/1 [00:00<?, ?it/s]{'loss': '4.197'}", True),
        ("steps     64 per epoch of 512 sequences, 1 in all", False),
        ("batch     4 examples x 1 accumulation x 2 ranks = 8 examples or about 200 tokens per step", False),
    ],
)
def test_the_first_step_is_recognised(line: str, is_first: bool) -> None:
    assert (start.FIRST_STEP.search(line) is not None) == is_first


def test_both_sides_get_the_same_settings(tmp_path: Path) -> None:
    plain, method = (start.command(side, tmp_path, 2, 24200) for side in (start.PLAIN, "topk"))
    script = plain.index(str(REPOSITORY / "tools/bench/plain_trl.py"))
    assert method == [*plain[:script], str(TRAIN), *plain[script + 1 :], "--method", "topk"]


def test_the_table_has_medians_and_ratios() -> None:
    seconds = {"plain": (10.0, 12.0, 50.0), "full": (9.0, 15.0, 12.6)}
    rows = [
        {"side": side, "seconds": value, "cpu_seconds": 2 * value}
        for side, values in seconds.items()
        for value in values
    ]
    assert start.table(rows).splitlines()[2:] == [
        "| plain | 3 | 12.00 | 1.000 | 24.00 | 1.000 |",
        "| full | 3 | 12.60 | 1.050 | 25.20 | 1.050 |",
    ]


def test_cpu_time_counts_processes_that_have_ended() -> None:
    """The child of a shell burns 0.3 s, which the kernel counts in hundredths; the shell itself next to nothing."""
    burn = f"{sys.executable} -c 'import time\nwhile time.process_time() < 0.3: pass'"
    with subprocess.Popen(["sh", "-c", f"{burn}; echo done; read _"], stdin=-1, stdout=-1, text=True) as process:
        assert process.stdout is not None
        assert process.stdin is not None
        assert process.stdout.readline() == "done\n"
        assert 0.25 <= start.cpu_seconds(start.psutil.Process(process.pid)) < 3
        process.stdin.write("\n")


@pytest.mark.parametrize("name", ["ranks", "rounds"])
def test_mistakes_end_in_one_line(name: str, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=rf"^agsel: error: {name} must be at least 1, got 0 \(--{name}\)$"):
        start.main(["--output", str(tmp_path / "new"), f"--{name}", "0"])
    assert not (tmp_path / "new").exists()


def test_a_launch_that_fails_ends_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(start.RunError, match="no first step, exit code 3: "):
        start.launch(["sh", "-c", "exit 3"])
