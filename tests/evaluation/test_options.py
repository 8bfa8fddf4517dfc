"""Settings of launch/evaluate.py: those that cannot be are refused by name."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from agsel import evaluate
from agsel.errors import UserError
from agsel.evaluation.findings import prepare_output, write_complete
from agsel.evaluation.harness import require_tasks
from agsel.evaluation.loading import load_model
from agsel.evaluation.options import EvaluationArguments
from tests.tiny_run import save_model


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"batch_size": 0}, "--batch_size"),
        ({"limit": 0}, "--limit"),
        ({"max_new_tokens": 0}, "--max_new_tokens"),
        ({"memory_fraction": 0.0}, "--memory_fraction"),
        ({"memory_fraction": 1.5}, "--memory_fraction"),
        ({"n_shot": -1}, "--n_shot"),
        ({"dtype": "fp32"}, "--dtype"),
        ({"answer_pattern": "("}, r"'\(' is no regular expression \(--answer_pattern\)"),
        ({"dataset_name": None}, "nothing to judge.*--tasks"),
        ({"dataset_name": None, "perplexity": "a.txt", "n_shot": 2}, "--n_shot is of --tasks or --dataset"),
        ({"dataset_name": None, "perplexity": "a.txt", "limit": 2}, "--limit is of --tasks, --dataset or --lm_eval"),
        ({"tasks": "gsm8k", "answer_pattern": "a"}, "--answer_pattern is of --dataset without --tasks"),
        ({"dataset_name": None, "perplexity": "a.txt", "answer_pattern": "a"}, "--answer_pattern is of --dataset"),
    ],
)
def test_bad_settings_are_named(settings: dict, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        EvaluationArguments(**{"model": "", "dataset_name": "rows.jsonl"} | settings)


def test_words_are_read_as_people_and_launchers_write_them() -> None:
    words = ["--local_rank=1", "--model", "m", "--dataset", "rows.jsonl", "--prompt_template", r"{q}\nA:"]
    arguments, fields = evaluate.read_arguments(words)
    assert (arguments.model, arguments.dataset_name, fields.prompt_template) == ("m", "rows.jsonl", "{q}\nA:")
    with pytest.raises(UserError, match="unknown setting 'modl' on the command line; did you mean 'model'"):
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


def test_a_base_that_cannot_be_loaded_is_named(tmp_path: Path) -> None:
    base = tmp_path / "base"
    base.mkdir()
    settings = {"peft_type": "LORA", "base_model_name_or_path": str(base)}
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match=rf"cannot load {base}, the base model of the adapter"):
        load_model(str(tmp_path), "auto")


@pytest.mark.parametrize("folder", ["model", "adapter"])
def test_weights_that_are_missing_or_damaged_are_not_drawn_at_random(tmp_path: Path, folder: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(save_model(tmp_path / "model", layers=1))
    settings = LoraConfig(r=2, target_modules="all-linear", base_model_name_or_path=str(tmp_path / "model"))
    get_peft_model(model, settings).save_pretrained(tmp_path / "adapter")
    load_model(str(tmp_path / folder), "auto")
    (path,) = (tmp_path / folder).glob("*.safetensors")
    weights = load_file(path)
    weights.pop(next(name for name in weights if "q_proj" in name))
    save_file(weights, path, {"format": "pt"})
    with pytest.raises(UserError, match=rf"{folder} \(--model\).*q_proj"):
        load_model(str(tmp_path / folder), "auto")
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(UserError, match=rf"cannot load .*{folder} \(--model\): .*header"):
        load_model(str(tmp_path / folder), "auto")


def test_a_name_that_is_neither_here_nor_on_the_hub_is_refused_as_both() -> None:
    with pytest.raises(
        UserError, match=r"^cannot load no/where \(--model\): .*[^.]; there is no such folder here either$"
    ):
        load_model("no/where", "auto")


def test_an_adapter_without_the_name_of_a_base_is_refused(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA", "base_model_name_or_path": null}')
    with pytest.raises(UserError, match="names no base model: write base_model_name_or_path"):
        load_model(str(tmp_path), "auto")


def test_a_model_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"cannot load .*/gone \(--model\)"):
        load_model(str(tmp_path / "gone"), "auto")


def test_an_output_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    os.mkfifo(tmp_path / "pipe")
    names = ("file/results.json", "rows.jsonl", "results.parts", "pipe")
    for path in (tmp_path, *(tmp_path / name for name in names)):
        with pytest.raises(ValueError, match="--output"):
            prepare_output(path)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("heldout.jsonl", '{"prompt": "1 + 1", "completion": "2"}\n'),
        ("heldout.json", '{"model_type": "llama"}'),
        ("heldout.json", '{"model": {"type": "BPE"}}'),
        ("heldout.json", "no JSON"),
    ],
)
def test_nothing_is_overwritten_but_results(tmp_path: Path, name: str, content: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=rf"{name} is not of an evaluation, .* choose another"):
        prepare_output(tmp_path / "heldout.json")
    (tmp_path / name).unlink()
    write_complete(tmp_path / "heldout.json", '{"model": "a", "rows": 1}\n')
    write_complete(tmp_path / "heldout.jsonl", '{"task": "rows", "row": 0, "completion": "2", "nll": 1.0}\n')
    prepare_output(tmp_path / "heldout.json")


@pytest.mark.parametrize(
    "content", [None, "task: x\ndataset_path: json\ndataset_kwargs: {data_files: gone.jsonl}\n", "- no task"]
)
def test_a_task_that_the_harness_does_not_take_is_refused(tmp_path: Path, content: str | None) -> None:
    path = tmp_path / "task.yaml"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ValueError, match=r"cannot load .*task.yaml \(--lm_eval\): "):
        require_tasks((str(path),))


def test_a_value_of_the_wrong_kind_is_refused_as_a_mistake_of_the_user() -> None:
    with pytest.raises(UserError, match=r"--batch_size.* 'many'"):
        evaluate.read_arguments(["--model", "m", "--batch_size", "many"])
    with pytest.raises(UserError, match="--model"):
        evaluate.read_arguments(["--batch_size", "2"])
