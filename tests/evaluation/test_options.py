"""Settings of launch/evaluate.py: those that cannot be are refused by name."""

from __future__ import annotations

from pathlib import Path

import pytest

from agsel import evaluate
from agsel.evaluation.findings import prepare_output
from agsel.evaluation.harness import require_tasks
from agsel.evaluation.loading import load_model
from agsel.evaluation.options import EvaluationArguments


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"batch_size": 0}, "--batch_size"),
        ({"limit": 0}, "--limit"),
        ({"max_new_tokens": 0}, "--max_new_tokens"),
        ({"n_shot": -1}, "--n_shot"),
        ({"dtype": "fp32"}, "--dtype"),
        ({"answer_pattern": "("}, r"'\(' is no regular expression \(--answer_pattern\)"),
        ({"dataset_name": None}, "nothing to judge.*--tasks"),
        ({"dataset_name": None, "perplexity": "a.txt", "n_shot": 2}, "--n_shot is of --tasks or --dataset"),
    ],
)
def test_bad_settings_are_named(settings: dict, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        EvaluationArguments(**{"model": "", "dataset_name": "rows.jsonl"} | settings)


def test_words_are_read_as_people_and_launchers_write_them() -> None:
    words = ["--local_rank=1", "--model", "m", "--dataset", "rows.jsonl", "--prompt_template", r"{q}\nA:"]
    arguments, fields = evaluate.read_arguments(words)
    assert (arguments.model, arguments.dataset_name, fields.prompt_template) == ("m", "rows.jsonl", "{q}\nA:")
    with pytest.raises(ValueError, match="--modl"):
        evaluate.read_arguments([*words, "--modl", "m"])


def test_the_folder_of_a_run_is_refused_by_the_name_of_its_model(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    for name in ("config.json", "adapter_config.json"):
        (tmp_path / "model" / name).write_text("{}")
        with pytest.raises(ValueError, match=rf"name its model, {tmp_path / 'model'}"):
            load_model(str(tmp_path), "auto")
        (tmp_path / "model" / name).unlink()


def test_an_adapter_whose_base_is_gone_is_refused(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA", "base_model_name_or_path": "./gone"}')
    with pytest.raises(ValueError, match=r"base model of the adapter .* is not at \./gone"):
        load_model(str(tmp_path), "auto")


def test_a_model_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"cannot load .*/gone \(--model\)"):
        load_model(str(tmp_path / "gone"), "auto")


def test_an_output_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path in (tmp_path, tmp_path / "file" / "results.json", tmp_path / "rows.jsonl"):
        with pytest.raises(ValueError, match="--output"):
            prepare_output(path)


@pytest.mark.parametrize("content", [None, "task: x\ndataset_path: json\n", "- no task"])
def test_a_task_that_the_harness_does_not_take_is_refused(tmp_path: Path, content: str | None) -> None:
    path = tmp_path / "task.yaml"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ValueError, match=r"cannot load .*task.yaml \(--lm_eval\): "):
        require_tasks([str(path)])
