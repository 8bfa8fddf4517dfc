"""What a run records of its steps, across kills and resumes."""

from __future__ import annotations

import errno
import json
import math
import os
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from agsel.monitor.history import METRICS, SELECTION, SelectionHistory, StepLines, curve, read_lines
from agsel.training.record import Record

BLOCKS = ("layers.0", "layers.1", "layers.2")


def written(path: Path, steps: range) -> Path:
    lines = StepLines(path, after=steps.start - 1)
    for step in steps:
        lines.append({"step": step, "loss": step / 10})
    lines.close()
    return path


def steps_of(path: Path) -> list[int]:
    return [line["step"] for line in read_lines(path)]


def test_a_resume_cuts_what_it_does_again(tmp_path: Path) -> None:
    path = written(tmp_path / "metrics.jsonl", range(1, 10))
    written(path, range(7, 12))
    assert steps_of(path) == [*range(1, 12)]


def test_a_line_that_a_kill_has_cut_is_no_line(tmp_path: Path) -> None:
    path = written(tmp_path / "metrics.jsonl", range(1, 6))
    whole = path.read_bytes()
    for cut in range(len(whole) - 20, len(whole)):
        path.write_bytes(whole[:cut])
        known = steps_of(path)
        assert known == [*range(1, 1 + whole[:cut].count(b"\n"))]
        written(path, range(known[-1] + 1, 8))
        assert steps_of(path) == [*range(1, 8)]


def test_a_run_in_another_folder_takes_over_what_came_before_its_checkpoint(tmp_path: Path) -> None:
    """Whatever an attempt before has left there, as a copy that a kill has cut."""
    (tmp_path / "first").mkdir()
    (tmp_path / "second").mkdir()
    origin, path = written(tmp_path / "first" / "m.jsonl", range(1, 10)), tmp_path / "second" / "m.jsonl"
    written(path, range(1, 3))
    StepLines(path, after=6, origin=origin).close()
    assert steps_of(path) == [*range(1, 7)]
    StepLines(path, after=6, origin=path).close()
    assert steps_of(path) == [*range(1, 7)]
    assert steps_of(origin) == [*range(1, 10)]


def test_a_run_from_the_beginning_keeps_nothing(tmp_path: Path) -> None:
    path = written(tmp_path / "m.jsonl", range(1, 4))
    StepLines(path, after=0, origin=written(tmp_path / "o.jsonl", range(1, 4))).close()
    assert path.read_bytes() == b""


def test_numbers_that_json_does_not_have_become_null(tmp_path: Path) -> None:
    lines = StepLines(tmp_path / "m.jsonl", after=0)
    lines.append({"step": 1, "loss": math.nan, "norm": math.inf, "lr": 0.5})
    lines.append({"step": 2, "loss": 1.5})
    assert read_lines(tmp_path / "m.jsonl")[0] == {"step": 1, "loss": None, "norm": None, "lr": 0.5}
    assert curve(read_lines(tmp_path / "m.jsonl"), "loss") == ([2], [1.5])


def test_the_history_of_the_selection_is_what_was_recorded(tmp_path: Path) -> None:
    record = Record(tmp_path, checkpoint=None)
    history = record.begin(BLOCKS, 0)
    for step, mode, selected, norms in [
        (1, "explore", ["layers.2", "layers.0"], {"layers.0": 0.123456, "layers.1": 1e-9, "layers.2": 3.0}),
        (2, "skipped", [], {"layers.1": math.inf}),
        (3, "exploit", ["layers.1"], {"layers.1": 2.0}),
    ]:
        history.add(step, mode, selected, norms)
        record.step(history)
    record.end()
    read = SelectionHistory.read(tmp_path / SELECTION)
    assert (read.blocks, read.steps, read.modes) == (BLOCKS, [1, 2, 3], ["explore", "skipped", "exploit"])
    assert read.trained().astype(int).tolist() == [[1, 0, 0], [0, 0, 1], [1, 0, 0]]
    assert read.counts() == {"layers.0": 1, "layers.1": 1, "layers.2": 1}
    expected = [[0.1235, math.nan, math.nan], [1e-9, math.nan, 2], [3, math.nan, math.nan]]
    np.testing.assert_allclose(read.measured(), np.array(expected), rtol=1e-6)
    first = json.loads((tmp_path / SELECTION).read_text().splitlines()[1])
    assert first.pop("seconds") >= 0
    assert first == {"step": 1, "mode": "explore", "blocks": [0, 2], "norms": [0.1235, 1e-9, 3.0]}


def test_a_resumed_record_goes_on_with_history_and_clock(tmp_path: Path) -> None:
    """Also where the last logged step lies long before the checkpoint."""
    record = Record(tmp_path, None)
    history = record.begin(BLOCKS, 0)
    record.log(1, {"loss": 1.0})
    for step in range(1, 5):
        history.add(step, "exploit", ["layers.1"], {"layers.1": 1.0})
        record.step(history)
    record.end()
    lines = [line | {"seconds": 25.0 * line["step"]} for line in read_lines(tmp_path / SELECTION)]
    (tmp_path / SELECTION).write_text("".join(json.dumps(line) + "\n" for line in lines))

    resumed = Record(tmp_path, tmp_path / "checkpoint-2")
    history = resumed.begin(BLOCKS, 2)
    assert history.steps == [1, 2]
    history.add(3, "explore", ["layers.0"], {})
    resumed.step(history)
    resumed.log(3, {"loss": 2.0})
    resumed.end()
    assert SelectionHistory.read(tmp_path / SELECTION).modes == ["exploit", "exploit", "explore"]
    assert [line["step"] for line in read_lines(tmp_path / METRICS)] == [1, 3]
    assert 50 <= read_lines(tmp_path / METRICS)[-1]["seconds"] < 60


def test_an_evaluation_at_the_start_of_a_resume_is_no_double(tmp_path: Path) -> None:
    record = Record(tmp_path, None)
    record.begin(BLOCKS, 0)
    record.log(0, {"eval_loss": 3.0})
    record.log(2, {"loss": 2.0})
    record.log(2, {"eval_loss": 2.0})
    record.end()
    resumed = Record(tmp_path, tmp_path / "checkpoint-2")
    resumed.begin(BLOCKS, 2)
    resumed.log(2, {"eval_loss": 2.0})
    resumed.log(2, {"eval_gsm8k_nll": 1.0})
    resumed.log(3, {"eval_loss": 1.0})
    resumed.end()
    known = [(line["step"], line.get("eval_loss")) for line in read_lines(tmp_path / METRICS)]
    assert known == [(0, 3.0), (2, None), (2, 2.0), (2, None), (3, 1.0)]


def test_lines_wait_for_room_on_a_full_disk(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "m.jsonl"
    lines = StepLines(path, after=0)
    lines.append({"step": 1})
    disk, room = lines._file, 4

    def write(text: bytearray) -> int:
        nonlocal room
        if not room:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        part, room = min(room, len(text)), 0
        return disk.write(text[:part])

    lines._file = SimpleNamespace(write=write, fileno=disk.fileno, name=str(path), close=disk.close)  # type: ignore[assignment]
    for step in (2, 3):
        lines.append({"step": step})
    lines.synchronise()
    assert steps_of(path) == [1]
    assert caplog.messages == [f"cannot write {path} (No space left on device): its lines wait for room"]
    room = 1000
    lines.append({"step": 4})
    lines.close()
    assert steps_of(path) == [1, 2, 3, 4]


def test_what_is_no_history_is_refused(tmp_path: Path) -> None:
    path = written(tmp_path / "selection.jsonl", range(1, 3))
    with pytest.raises(ValueError, match="does not begin with the names of the blocks"):
        SelectionHistory.read(path)
