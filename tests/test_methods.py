"""A method that agsel does not know, from the Python path, through `agsel.attach` and through `launch/train.py`."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.round_robin import RoundRobin
from tests.test_launch import LAYERS, several_runs
from tests.tiny_run import save_model, save_rows, settings
from tests.zero.scenario import Scenario, start_engine, train_step

TURNS = [("layers.0", "layers.1"), ("layers.2", "layers.3")]


@pytest.mark.usefixtures("one_rank")
def test_a_rule_from_elsewhere_is_attached_like_any_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "0")
    policy = partial(RoundRobin, fraction=0.5, stride=2)
    engine, selection = start_engine(Scenario(stage=2, blocks="layers", policy=policy))
    for step in range(6):
        train_step(engine, step, accumulation=1)
        assert selection.last.selected == TURNS[step // 2 % 2]
    engine.destroy()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("methods")


@pytest.fixture(scope="module")
def runs(folder: Path) -> dict[str, Any]:
    parts = save_model(folder / "model"), save_rows(folder / "rows.jsonl", 32)
    (folder / "recipe.yaml").write_text(
        yaml.safe_dump({"method": "topk", "epsilon_start": 0.5, "select_fraction": 0.5})
    )
    chosen: dict[str, dict[str, Any]] = {
        "round robin": {"method": "tests.round_robin:RoundRobin", "stride": 2, "logging_steps": 1},
        "lazy": {"method": "tests.round_robin:Lazy", "select_fraction": 0.25},
        "recipe": {"config": folder / "recipe.yaml", "select_fraction": None},
        "full": {"config": folder / "recipe.yaml", "method": "full", "select_fraction": None},
    }
    return several_runs(folder, {name: settings(*parts, folder / name, **changed) for name, changed in chosen.items()})


def selection_of(folder: Path, name: str, runs: dict[str, Any]) -> dict[str, Any]:
    code, output, steps = runs[name]
    assert code == 0, output[-6000:]
    assert steps == 6
    return json.loads((folder / name / "selection.json").read_text())


def test_a_rule_from_elsewhere_trains_by_its_name_with_settings_of_its_own(folder: Path, runs: dict[str, Any]) -> None:
    report = selection_of(folder, "round robin", runs)
    assert report["counts"] == dict(zip(LAYERS, [4, 4, 2, 2], strict=True))
    assert (report["method"], report["stride"]) == ("RoundRobin", 2)
    lines = [line for line in runs["round robin"][1].splitlines() if line.startswith("step ")]
    assert [line.split("  ")[-2] for line in lines] == [
        f"layers {pair}" for pair in ("0-1", "2-3", "0-1") for _ in (0, 1)
    ]


def test_a_rule_without_a_line_of_its_own_reads_the_flags_of_the_one_it_derives_from(
    folder: Path, runs: dict[str, Any]
) -> None:
    report = selection_of(folder, "lazy", runs)
    assert report["method"] == "Lazy"
    assert sum(report["counts"].values()) == 6


@pytest.mark.parametrize(
    ("name", "ignored"),
    [
        ("round robin", None),
        ("recipe", "topk does not read epsilon_start 0.5"),
        ("full", "full does not read epsilon_start 0.5, select_fraction 0.5"),
    ],
)
def test_what_a_file_sets_for_another_method_is_said_once(
    folder: Path, runs: dict[str, Any], name: str, ignored: str | None
) -> None:
    selection_of(folder, name, runs)
    lines = [line for line in runs[name][1].splitlines() if line.startswith("ignored ")]
    assert lines == ([f"ignored   {ignored}"] if ignored else [])
