"""Tasks judged while a model trains: what is logged at the last step is what launch/evaluate.py finds in model/."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.distributed import REPOSITORY, environment, run_ranks
from tests.tiny_run import TRAIN, save_model, save_rows, settings

NEW_TOKENS = 5
PROBLEMS = 11
PLAIN = {"gradient_checkpointing": "false"}


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """Model, rows to train on, and problems: an untrained model answers some right, as all answers are its words."""
    folder = tmp_path_factory.mktemp("judging")
    problems = [{"question": f"w{n} w{n + 1} w3", "answer": f"w4 #### {n}"} for n in range(4, 4 + PROBLEMS)]
    (folder / "problems.jsonl").write_text("".join(json.dumps(row) + "\n" for row in problems))
    return save_model(folder / "model"), save_rows(folder / "rows.jsonl"), folder / "problems.jsonl"


def judged(parts: tuple[Path, Path, Path], folder: Path, ranks: int, **changed: object) -> tuple[list[dict], str]:
    """What was logged of the problems, by evaluation; and what was printed."""
    model, rows, problems = parts
    chosen: dict[str, Any] = {"eval_strategy": "steps", "eval_steps": 2, "max_steps": 4, "eval_dataset": rows}
    chosen |= {"eval_tasks": f"gsm8k={problems}", "eval_max_new_tokens": NEW_TOKENS, "save_strategy": "steps"}
    chosen |= {"save_steps": 4} | changed
    printed = run_ranks(TRAIN, *settings(model, rows, folder, **chosen), ranks=ranks)
    state = json.loads((folder / "checkpoint-4" / "trainer_state.json").read_text())
    return [entry for entry in state["log_history"] if "eval_gsm8k_nll" in entry], printed


def evaluated(model: Path, problems: Path, output: Path) -> dict[str, Any]:
    words = ["--model", model, "--tasks", "gsm8k", "--dataset", problems, "--max_new_tokens", NEW_TOKENS]
    command = [sys.executable, "launch/evaluate.py", *map(str, words), "--output", str(output)]
    subprocess.run(command, cwd=REPOSITORY, env=environment(), check=True, capture_output=True)
    return json.loads(output.read_text())


def require_equal(run: Path, logged: list[dict], problems: Path) -> dict[str, Any]:
    """The last line logged is what launch/evaluate.py finds."""
    found = evaluated(run / "model", problems, run / "found.json")
    assert math.isclose(logged[-1]["eval_gsm8k_nll"], found["nll"], rel_tol=1e-5)
    assert logged[-1]["eval_gsm8k_accuracy"] == found["accuracy"]
    assert found["rows"] == PROBLEMS
    return found


@pytest.fixture(scope="module")
def at_zero3(parts: tuple[Path, Path, Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict], str]:
    """Run folder, what was logged of the problems, what was printed: judging gathers the very weights that train."""
    run = tmp_path_factory.mktemp("zero3") / "run"
    return run, *judged(parts, run, 2, deepspeed="zero3")


def test_the_last_evaluation_is_that_of_the_trained_model(
    parts: tuple[Path, Path, Path], at_zero3: tuple[Path, list[dict], str]
) -> None:
    run, logged, printed = at_zero3
    assert [entry["step"] for entry in logged] == [2, 4]
    assert logged[0]["eval_gsm8k_nll"] != logged[1]["eval_gsm8k_nll"], "it goes on learning in between"
    found = require_equal(run, logged, parts[2])
    assert f"gsm8k nll {found['nll']:.4f}" in printed


@pytest.mark.slow
def test_the_weights_are_those_of_a_run_that_judges_nothing(
    parts: tuple[Path, Path, Path], at_zero3: tuple[Path, list[dict], str], tmp_path: Path
) -> None:
    run = tmp_path / "without"
    nothing, _ = judged(parts, run, 2, deepspeed="zero3", eval_tasks=None, eval_max_new_tokens=None)
    assert nothing == []
    weights = [(folder / "model" / "model.safetensors").read_bytes() for folder in (run, at_zero3[0])]
    assert weights[0] == weights[1]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ranks", "changed"),
    [
        (1, {"gradient_checkpointing": "true"}),
        (3, {"use_peft": "true", "lora_target_modules": "all-linear"}),
        (3, {"deepspeed": "zero3", "use_peft": "true", "lora_target_modules": "all-linear", **PLAIN}),
    ],
    ids=["zero2-1", "zero2-lora-3", "zero3-lora-3"],
)
def test_the_same_with_other_stages_adapters_and_ranks(
    parts: tuple[Path, Path, Path], tmp_path: Path, ranks: int, changed: dict
) -> None:
    logged, _ = judged(parts, tmp_path / "run", ranks, **changed)
    require_equal(tmp_path / "run", logged, parts[2])
