"""What a run cost, of a clock that the test holds; and files that are whole or as they were."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import TrainerControl, TrainerState

from agsel import replacing
from agsel.training import cost
from tests.tiny import tiny_model


@pytest.mark.parametrize("pause", [cost.CostCallback.on_evaluate, cost.CostCallback.on_save])
def test_steps_take_as_long_as_they_take_without_pauses(
    monkeypatch: pytest.MonkeyPatch, pause: Callable[..., None]
) -> None:
    """Three of 2 s each, and a pause of 10 s after each."""
    now = [0.0]
    monkeypatch.setattr(cost.time, "perf_counter", lambda: now[0])
    trainer: Any = SimpleNamespace(model=tiny_model())
    configuration: Any = SimpleNamespace(blocks_of=lambda model: [])
    callback, state, control = cost.CostCallback(trainer, configuration), TrainerState(), TrainerControl()
    arguments: Any = None
    callback.on_train_begin(arguments, state, control)
    for _ in range(3):
        now[0] += 2
        callback.on_step_end(arguments, state, control)
        now[0] += 10
        pause(callback, arguments, state, control)
    now[0] += 100
    found = callback.describe(state)
    assert (found["step_seconds"], found["timed_steps"], found["train_seconds"]) == (2, 3, 36)


def test_a_file_that_cannot_be_replaced_stays_and_nothing_beside_it(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("old")
    with pytest.raises(UnicodeEncodeError):
        replacing.replace_file(tmp_path / "a.json", "new \ud800")
    os.mkfifo(tmp_path / "b.json")
    with pytest.raises(OSError, match="no file that could be replaced"):
        replacing.replace_file(tmp_path / "b.json", "new")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.json", "b.json"]
    assert (tmp_path / "a.json").read_text() == "old"


def test_what_a_link_names_is_replaced_and_not_the_link(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "a.json").symlink_to(tmp_path / "elsewhere" / "a.json")
    for text in ("first", "second"):
        replacing.replace_file(tmp_path / "a.json", text)
        assert (tmp_path / "elsewhere" / "a.json").read_text() == text
    assert (tmp_path / "a.json").is_symlink()


def test_an_earlier_cost_is_kept_only_of_the_same_steps(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    known = dict.fromkeys(cost.OF_STEPS_DONE, 1) | {"steps": 4, "loss": 2.0}
    none = dict.fromkeys(cost.OF_STEPS_DONE) | {"timed_steps": 0, "steps": 4, "loss": 3.0}
    assert cost.keep_known_cost(none, path) == none
    path.write_text(json.dumps(known))
    assert cost.keep_known_cost(none, path) == known | {"loss": 3.0}
    assert cost.keep_known_cost(none | {"steps": 5}, path) == none | {"steps": 5}
    assert cost.keep_known_cost(none | {"timed_steps": 2}, path) == none | {"timed_steps": 2}
    path.write_text("{")
    assert cost.keep_known_cost(none, path) == none
