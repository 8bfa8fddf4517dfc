"""tools/compare_quality.py: mistakes in one line; a real comparison of two short runs (slow)."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.distributed import REPOSITORY, environment
from tests.tiny_run import save_model, save_rows

sys.path.insert(0, str(REPOSITORY / "tools"))
import compare_quality  # type: ignore[import-not-found]

RECIPE = """
model_name_or_path: {folder}/model
dataset_name: {folder}/train.jsonl
prompt_field: question
completion_field: answer
prompt_template: null
completion_template: " {{answer}}"
per_device_train_batch_size: 2
max_steps: 30
max_length: 64
bf16: false
gradient_checkpointing: false
save_strategy: "no"
"""


def compare(*arguments: object, folder: Path = REPOSITORY) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, REPOSITORY / "tools/compare_quality.py", *map(str, arguments)]
    return subprocess.run(command, cwd=folder, env=environment(), capture_output=True, text=True, check=False)


@pytest.fixture
def refusal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """What the command prints last when it refuses these arguments, in this process: imports take seconds."""

    def of(*arguments: object) -> str:
        monkeypatch.setattr(sys, "argv", ["compare_quality.py", *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            compare_quality.main()
        assert end.value.code == 2
        return capsys.readouterr().err.strip().splitlines()[-1]

    return of


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--runs", "full"), "'full' is not METHOD:RATE[:STAGE], for example"),
        (("--runs", "full:fast"), "'full:fast' is not METHOD:RATE[:STAGE]"),
        (("--runs", "full:1e-4:4"), "'full:1e-4:4' is not METHOD:RATE[:STAGE]"),
        (("--runs", "full:1e-4:2:2"), "'full:1e-4:2:2' is not METHOD:RATE[:STAGE]"),
        (("--runs", "fool:1e-4"), "unknown method 'fool' in 'fool:1e-4': use one of adagradselect, topk"),
        (("--runs", "full:1e-4", "--config", "nowhere.yaml"), "nowhere.yaml, launch/recipes/ has some"),
        (("--runs", "full:1e-4"), "names no held-out rows (dataset_test_split): give a file of them (--heldout)"),
    ],
)
def test_mistakes_are_named_in_one_line(
    refusal: Callable[..., str], monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], message: str
) -> None:
    monkeypatch.chdir(REPOSITORY)
    last = refusal("--config", "launch/recipes/demo.yaml", *arguments)
    assert last.startswith("compare_quality.py: error: ")
    assert message in last


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ("dataset_name: rows.jsonl\ndataset_test_split: test", "recipe.yaml has no model_name_or_path: add it"),
        ("model_name_or_path: model\ndataset_test_split: test", "recipe.yaml has no dataset_name: add it"),
        ("model_name_or_path:\ndataset_name: rows\ndataset_test_split: test", "has no model_name_or_path: add it"),
        ("", "recipe.yaml has no settings"),
        ("a: b: c", "recipe.yaml is no YAML"),
    ],
)
def test_recipes_without_a_needed_setting_are_refused(
    refusal: Callable[..., str], tmp_path: Path, recipe: str, message: str
) -> None:
    (tmp_path / "recipe.yaml").write_text(recipe)
    assert message in refusal("--config", tmp_path / "recipe.yaml", "--runs", "full:1e-4")


def test_paths_are_of_the_callers_folder_and_a_failed_command_is_named_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(f"model_name_or_path: {tmp_path}/no_model\ndataset_name: unused")
    (tmp_path / "heldout.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    paths = ("--config", "recipe.yaml", "--heldout", "heldout.jsonl", "--output", "results")
    result = compare(*paths, "--runs", "full:1e-4", folder=tmp_path)
    assert result.returncode == 1
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("agsel: error: exit code 1, the reason is above, of the command: ")
    assert f"launch/evaluate.py --model {tmp_path}/no_model --output {tmp_path}/results/before.json" in last
    assert f"--dataset {tmp_path}/heldout.jsonl" in last
    assert "Traceback" not in result.stderr


@pytest.mark.slow
def test_a_comparison_trains_every_run_and_says_what_was_learnt(tmp_path: Path) -> None:
    save_model(tmp_path / "model")
    save_rows(tmp_path / "train.jsonl")
    heldout = ("--heldout", save_rows(tmp_path / "heldout.jsonl", 8))
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE.format(folder=tmp_path))
    result = compare("--config", recipe, *heldout, "--output", tmp_path / "runs", "--runs", "full:1e-2", "topk:1e-2:3")
    assert result.returncode == 0, result.stderr[-3000:]
    table = [line.split(" | ") for line in result.stdout.splitlines() if line.startswith("| ")][1:]
    assert [row[0].lstrip("| ") for row in table] == ["before", "full", "topk"]
    before, full, topk = (float(row[3]) for row in table)
    assert full < before - 0.1
    assert topk < before - 0.1
