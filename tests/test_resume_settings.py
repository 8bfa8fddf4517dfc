"""Settings that changed since the checkpoint was saved: refused by name and flag, or said and in effect."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from tests.distributed import REPOSITORY
from tests.test_launch import alone, said, scalars
from tests.tiny_run import save_model, save_rows, settings

REFUSED: dict[str, tuple[dict[str, object], list[str]]] = {
    "model": (
        {"model_name_or_path": "deeper"},
        ["model was LlamaForCausalLM of 25,172 parameters (", "30,604 parameters", "--model_name_or_path"],
    ),
    "stage": (
        {"deepspeed": REPOSITORY / "ds_configs" / "zero1.json"},
        ["stage was 2 and is 1 now (--deepspeed;"],
    ),
    "dtype": ({"bf16": "true"}, ["dtype was float32 and is bfloat16 now (--bf16,"]),
    "rows": ({"dataset_name": "fewer.jsonl"}, ["dataset was 32 rows (", "and is 31 rows (", "--dataset_name"]),
    "order": ({"dataset_name": "other_order.jsonl"}, ["dataset was 32 rows (", "and is 32 rows (", "--dataset_name"]),
    "template": ({"completion_template": " w3 {answer}"}, ["dataset was 32 rows (", "--completion_template"]),
    "examples": (
        {"gradient_accumulation_steps": 2},
        ["examples per step was 2 and is 4 now (", "--gradient_accumulation_steps"],
    ),
    "seed": ({"seed": 7}, ["seed was 42 and is 7 now (--seed, --data_seed;"]),
    "data seed": ({"data_seed": 7}, ["seed was 42 and is 7 now (--seed, --data_seed;"]),
    "method": ({"method": "random"}, ["method was adagradselect and is random now (--method;"]),
    "blocks": ({"select_blocks": "all"}, ["blocks was layers and is all now (--select_blocks;"]),
    "learning rate": ({"learning_rate": 2e-2}, ["learning rate was 0.01 and is 0.02 now (--learning_rate;"]),
    "weight decay": ({"weight_decay": 0.1}, ["weight decay was 0.0 and is 0.1 now (--weight_decay;"]),
    "adam": ({"adam_beta2": 0.9}, ["adam was betas 0.9 0.999, epsilon 1e-08 and is betas 0.9 0.9,", "--adam_beta2"]),
    "two": (
        {"seed": 7, "method": "random"},
        ["seed was 42 and is 7 now", "method was adagradselect and is random now"],
    ),
}
SAID: dict[str, tuple[dict[str, object], str]] = {
    "nothing": ({}, ""),
    "fraction": ({"select_fraction": 0.25}, "fraction was 0.5 and is 0.25 now: takes effect after the next step"),
    "selection seed": ({"selection_seed": 7}, "selection seed was 42 and is 7 now: has no effect"),
    "steps": ({"max_steps": 8}, "steps was 6 and is 8 now: takes effect from here on"),
    "epochs": (
        {"max_steps": -1, "num_train_epochs": 0.5},
        "steps was 6 and is those of 0.5 epochs now: takes effect from here on",
    ),
    "schedule": (
        {"lr_scheduler_type": "constant"},
        "schedule was linear after 0 of warmup and is constant after 0 of warmup now: takes effect from here on",
    ),
    "clipping": ({"max_grad_norm": 1e-3}, "clipping was 1.0 and is 0.001 now: takes effect from here on"),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models and data: those of the run, and others."""
    folder = tmp_path_factory.mktemp("resume_settings")
    save_model(folder / "model")
    save_model(folder / "deeper", layers=5)
    rows = save_rows(folder / "rows.jsonl", 32).read_text().splitlines(keepends=True)
    (folder / "fewer.jsonl").write_text("".join(rows[:-1]))
    (folder / "other_order.jsonl").write_text("".join(reversed(rows)))
    return folder


@pytest.fixture(scope="module")
def outcomes(folder: Path) -> dict[str, Any]:
    """Every case resumes from step 4 of the run that is the first case, into a run folder of its own."""
    always = {"max_steps": 6, "logging_steps": 1}
    parts = folder / "model", folder / "rows.jsonl"
    cases = {"saved": settings(*parts, folder / "saved", save_strategy="steps", save_steps=4, **always)}
    for name, changed in {name: case[0] for name, case in (REFUSED | SAID).items()}.items():
        here = {
            key: folder / str(value) for key, value in changed.items() if key in ("model_name_or_path", "dataset_name")
        }
        arguments = always | changed | here | {"resume_from_checkpoint": folder / "saved" / "checkpoint-4"}
        cases[name] = settings(*parts, folder / name, **arguments)
    (folder / "cases.json").write_text(json.dumps(cases))
    worker = alone(REPOSITORY / "tests" / "resume_settings_worker.py", folder / "cases.json")
    assert worker.returncode == 0, worker.stderr[-6000:]
    return json.loads(worker.stdout.partition("RESULT")[2])


@pytest.mark.parametrize("case", REFUSED)
def test_a_setting_that_cannot_change_is_refused_by_name_and_flag(outcomes: dict[str, Any], case: str) -> None:
    code, output, _ = outcomes[case]
    assert code == 1
    (line,) = said(output)
    assert line.startswith("agsel: error: cannot resume (--resume_from_checkpoint): ")
    for words in REFUSED[case][1]:
        assert words in line
    assert line.count(" and is ") == (2 if case == "two" else 1), "no other setting is blamed"
    assert "set it back, or start a new run from the checkpoint's weights" in line
    assert "Traceback" not in output


@pytest.mark.parametrize("case", SAID)
def test_a_setting_that_may_change_is_said(outcomes: dict[str, Any], case: str) -> None:
    code, output, _ = outcomes[case]
    assert code == 0, output[-6000:]
    changed = [line for line in output.splitlines() if line.startswith("changed ")]
    assert [line.startswith(f"changed   {SAID[case][1]}") for line in changed] == [True] * (case != "nothing")


def test_another_fraction_takes_effect(folder: Path, outcomes: dict[str, Any]) -> None:
    assert scalars(folder / "nothing")["selection/blocks"] == [2, 2]
    assert scalars(folder / "fraction")["selection/blocks"] == [2, 1]


def test_another_length_takes_effect(outcomes: dict[str, Any]) -> None:
    steps = {case: outcomes[case][2] for case in SAID}
    assert steps == dict.fromkeys(SAID, 6) | {"steps": 8, "epochs": 8}


def test_another_schedule_takes_effect(folder: Path, outcomes: dict[str, Any]) -> None:
    rates = {case: scalars(folder / case)["train/learning_rate"] for case in ("nothing", "steps", "schedule")}
    assert rates["nothing"] == pytest.approx([1e-2 * 2 / 6, 1e-2 * 1 / 6], rel=1e-6)
    assert rates["steps"][1:] == pytest.approx([1e-2 * left / 8 for left in (3, 2, 1)], rel=1e-6)
    assert rates["schedule"][1:] == pytest.approx([1e-2], rel=1e-6)


def test_another_seed_of_the_selection_has_no_effect(folder: Path, outcomes: dict[str, Any]) -> None:
    nothing, other = ((folder / case / "selection.json").read_text() for case in ("nothing", "selection seed"))
    assert re.sub(r".*seed.*", "", other) == re.sub(r".*seed.*", "", nothing)
