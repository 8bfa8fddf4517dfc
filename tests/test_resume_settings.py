"""Settings that changed since the checkpoint was saved: refused by name and flag, or said and in effect."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from agsel.elements import ElementMask
from agsel.errors import UserError
from agsel.runs.folder import FILE_OF_ELEMENTS
from agsel.runs.resume import compare
from agsel.training.arguments import SelectionArguments
from agsel.training.chosen_elements import FILE
from agsel.training.identity import describe_settings, fingerprint_of_rows
from agsel.training.methods import build_policy
from tests.distributed import REPOSITORY
from tests.test_launch import said, scalars, several_runs
from tests.tiny import random_mask, tiny_model
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
    "rows": ({"dataset_name": "fewer.jsonl"}, ["data was 32 rows (", "and is 31 rows (", "--dataset_name"]),
    "order": ({"dataset_name": "other_order.jsonl"}, ["data was 32 rows (", "and is 32 rows (", "--dataset_name"]),
    "template": ({"completion_template": " w3 {answer}"}, ["data was 32 rows (", "--completion_template"]),
    "examples": (
        {"gradient_accumulation_steps": 2},
        ["examples per step was 2 and is 4 now (", "--gradient_accumulation_steps"],
    ),
    "seed": ({"seed": 7}, ["seed was 42 and is 7 now (--seed, --data_seed;"]),
    "data seed": ({"data_seed": 7}, ["seed was 42 and is 7 now (--seed, --data_seed;"]),
    "sampling": (
        {"train_sampling_strategy": "sequential"},
        ["order was random and is sequential now (--train_sampling_strategy;"],
    ),
    "method": ({"method": "random"}, ["method was adagradselect and is random now (--method;"]),
    "blocks": ({"select_blocks": "all"}, ["blocks was layers and is all now (--select_blocks, --select_from;"]),
    "lowest": ({"select_from": 2}, ["blocks was layers and is layers from 2 now (--select_blocks, --select_from;"]),
    "learning rate": ({"learning_rate": 2e-2}, ["learning rate was 0.01 and is 0.02 now (--learning_rate;"]),
    "weight decay": ({"weight_decay": 0.1}, ["weight decay was 0.0 and is 0.1 now (--weight_decay;"]),
    "adam": ({"adam_beta2": 0.9}, ["adam was betas 0.9 0.999, epsilon 1e-08 and is betas 0.9 0.9,", "--adam_beta2"]),
    "two": (
        {"seed": 7, "method": "random"},
        ["seed was 42 and is 7 now", "method was adagradselect and is random now"],
    ),
}
ELEMENTS = {"elements": "gallop", "element_density": 0.1, "element_samples": 16}
OTHER_ELEMENTS: dict[str, tuple[dict[str, object], str]] = {
    "density": ({"element_density": 0.2}, "gallop with density 0.2 by 16 samples"),
    "choice": ({"elements": "saft"}, "saft with density 0.1 by 16 samples"),
    "no elements": (dict.fromkeys(ELEMENTS), "none chosen"),
}
ADAPTERS = {
    "use_peft": True,
    "use_dora": False,
    "lora_r": 8,
    "lora_alpha": 16,
    "use_rslora": False,
    "lora_dropout": 0.0,
}
NO_ADAPTERS = SimpleNamespace(**ADAPTERS | {"use_peft": False})
MASKS = ("no mask", "damaged mask", "mask of another choice")
"""In the folder of a run that resumes."""
SAID: dict[str, tuple[dict[str, object], str]] = {
    "nothing": ({}, ""),
    "fraction": (
        {"select_fraction": 0.25},
        "fraction was 0.5 and is 0.25 now: takes effect when blocks",
    ),
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
    "loss": (
        {"completion_only_loss": "false"},
        "loss was on completions and is on all tokens now: takes effect from here on (--completion_only_loss,",
    ),
    "smoothing": (
        {"label_smoothing_factor": 0.1},
        "loss function was nll with label smoothing 0 and is nll with label smoothing 0.1 now: takes effect",
    ),
    "noise": (
        {"neftune_noise_alpha": 5},
        "noise was 0 on embeddings, dropout 0 in adapters and is 5 on embeddings, dropout 0 in adapters now: takes",
    ),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models and data: those of the run, and others."""
    folder = tmp_path_factory.mktemp("resume_settings")
    save_model(folder / "model")
    save_model(folder / "deeper", layers=5)
    other = AutoModelForCausalLM.from_pretrained(folder / "model")
    with torch.no_grad():
        other.model.layers[1].mlp.down_proj.weight.mul_(1.01)
    shutil.copytree(folder / "model", folder / "other weights")
    other.save_pretrained(folder / "other weights")
    rows = save_rows(folder / "rows.jsonl", 32).read_text().splitlines(keepends=True)
    (folder / "fewer.jsonl").write_text("".join(rows[:-1]))
    (folder / "other_order.jsonl").write_text("".join(reversed(rows)))
    for name in MASKS[1:]:
        (folder / name).mkdir()
    random_mask(tiny_model(), 0.1).save(folder / "mask of another choice" / FILE)
    written = (folder / "mask of another choice" / FILE).read_bytes()
    (folder / "damaged mask" / FILE).write_bytes(written[: len(written) // 2])
    return folder


@pytest.fixture(scope="module")
def outcomes(folder: Path) -> dict[str, Any]:
    """Every case resumes from step 4 of the run that is the first case, into a run folder of its own.

    Those about elements resume from another one, which trains some.
    """
    always = {"max_steps": 6, "logging_steps": 1}
    parts = folder / "model", folder / "rows.jsonl"
    cases = {"saved": settings(*parts, folder / "saved", save_strategy="steps", save_steps=4, **always)}
    for name, changed in {name: case[0] for name, case in (REFUSED | SAID).items()}.items():
        here = {
            key: folder / str(value) for key, value in changed.items() if key in ("model_name_or_path", "dataset_name")
        }
        arguments = always | changed | here | {"resume_from_checkpoint": folder / "saved" / "checkpoint-4"}
        cases[name] = settings(*parts, folder / name, **arguments)
    cases["again"] = settings(*parts, folder / "saved", **always, resume_from_checkpoint="auto")
    shorter = {"max_steps": 3, "resume_from_checkpoint": folder / "saved" / "checkpoint-4"}
    cases["shorter"] = settings(*parts, folder / "shorter", **shorter)
    always |= ELEMENTS
    cases["elements"] = settings(*parts, folder / "elements", save_strategy="steps", save_steps=4, **always)
    always |= {"resume_from_checkpoint": folder / "elements" / "checkpoint-4"}
    for name, changed in {name: case[0] for name, case in OTHER_ELEMENTS.items()}.items():
        cases[name] = settings(*parts, folder / name, **always | changed)
    cases |= {name: settings(*parts, folder / name, **always) for name in MASKS}
    always = {"max_steps": 2, "use_peft": True, "lora_target_modules": "all-linear", "save_strategy": "steps"}
    cases["adapted"] = settings(*parts, folder / "adapted", save_steps=1, **always)
    always["resume_from_checkpoint"] = folder / "adapted" / "checkpoint-1"
    for base in ("model", "other weights"):
        other = {"model_name_or_path": folder / base, "output_dir": folder / f"over {base}"}
        cases[f"over {base}"] = settings(*parts, folder, **always | other)
    return several_runs(folder, cases)


@pytest.mark.parametrize("case", REFUSED)
def test_a_setting_that_cannot_change_is_refused_by_name_and_flag(
    folder: Path, outcomes: dict[str, Any], case: str
) -> None:
    code, output, _ = outcomes[case]
    assert code == 2
    (line,) = said(output)
    assert line.startswith("agsel: error: cannot resume (--resume_from_checkpoint): ")
    for words in REFUSED[case][1]:
        assert words in line
    assert line.count(" and is ") == (2 if case == "two" else 1), "no other setting is blamed"
    assert "set it back, or start a new run from the checkpoint's weights" in line
    assert not (folder / case / "config.yaml").exists(), "the settings of the run before stay readable"
    assert "Traceback" not in output


def test_a_run_that_is_past_its_end_is_refused(folder: Path, outcomes: dict[str, Any]) -> None:
    code, output, _ = outcomes["shorter"]
    assert code == 2
    (line,) = said(output)
    assert "the checkpoint is of step 4, and the run ends at step 3: raise --max_steps" in line
    assert not (folder / "shorter" / "config.yaml").exists()


def test_a_run_that_has_ended_keeps_its_cost_when_it_is_resumed(folder: Path, outcomes: dict[str, Any]) -> None:
    code, output, steps = outcomes["again"]
    assert (code, steps) == (0, 6), output[-6000:]
    assert "trained   0 steps" in output
    result = json.loads((folder / "saved" / "result.json").read_text())
    assert (result["steps"], result["timed_steps"]) == (6, 6)
    assert result["train_seconds"] > result["step_seconds"] > 0


def test_adapters_go_on_over_the_weights_that_they_were_trained_over(outcomes: dict[str, Any]) -> None:
    """A checkpoint has none of those, and whatever weights are there fit."""
    assert outcomes["over model"][0] == 0, outcomes["over model"]
    code, output, _ = outcomes["over other weights"]
    assert code == 2, output
    (line,) = said(output)
    assert "base weights was" in line
    assert "now (--model_name_or_path, --model_revision; the saved adapters belong to them" in line
    assert line.endswith("set it back, or start a new run (another --output_dir)")


@pytest.mark.parametrize("case", OTHER_ELEMENTS)
def test_another_choice_of_elements_is_refused(outcomes: dict[str, Any], case: str) -> None:
    code, output, _ = outcomes[case]
    assert code == 2
    (line,) = said(output)
    assert (
        f"elements was gallop with density 0.1 by 16 samples and is {OTHER_ELEMENTS[case][1]} now (--elements," in line
    )
    assert line.count(" and is ") == 1


@pytest.mark.parametrize("case", MASKS)
def test_elements_are_chosen_again_where_the_mask_is_not_that_of_the_run(
    folder: Path, outcomes: dict[str, Any], case: str
) -> None:
    code, output, steps = outcomes[case]
    assert (code, steps) == (0, 6), output[-6000:]
    assert "as chosen before" not in output
    assert ElementMask.load(folder / case / FILE).about == ElementMask.load(folder / "elements" / FILE).about
    for name in (FILE, FILE_OF_ELEMENTS):
        tensors, expected = load_file(folder / case / name), load_file(folder / "elements" / name)
        assert tensors.keys() == expected.keys()
        assert all(torch.equal(tensors[key], expected[key]) for key in expected)


@pytest.mark.slow
def test_other_elements_than_those_of_the_checkpoint_are_refused(folder: Path, outcomes: dict[str, Any]) -> None:
    """If the mask of the run folder only says that it is the same choice."""
    assert outcomes["elements"][0] == 0
    saved = ElementMask.load(folder / "elements" / FILE)
    (folder / "changed").mkdir()
    moved = {name: torch.arange(len(indices), dtype=torch.int32) for name, indices in saved.indices.items()}
    ElementMask(moved, saved.shapes, saved.about).save(folder / "changed" / FILE)
    changed = ELEMENTS | {"resume_from_checkpoint": folder / "elements" / "checkpoint-4"}
    parts = folder / "model", folder / "rows.jsonl", folder / "changed"
    code, output, _ = several_runs(folder, {"changed": settings(*parts, **changed)})["changed"]
    assert code == 2
    (line,) = said(output)
    assert "chosen elements was " in line
    assert "now (mask.safetensors of the run folder; the saved optimizer states belong to them)" in line


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


def described(method: str, model: SimpleNamespace = NO_ADAPTERS, **changed: Any) -> dict[str, Any]:
    """Of a run without a dataset file or an engine."""
    selection = {name: changed.pop(name) for name in ("fold_adapters", "choose_early") if name in changed}
    chosen = {"select_fraction": 0.3, "selection_seed": None, "seed": 42} | changed
    training = SimpleNamespace(
        per_device_train_batch_size=1,
        gradient_accumulation_steps=1,
        world_size=1,
        seed=42,
        data_seed=None,
        train_sampling_strategy="random",
        learning_rate=1e-3,
        weight_decay=0.0,
        adam_beta1=0.9,
        adam_beta2=0.999,
        adam_epsilon=1e-8,
        max_steps=1,
        lr_scheduler_type=SimpleNamespace(value="linear"),
        lr_scheduler_kwargs=None,
        warmup_steps=0,
        max_grad_norm=1.0,
        loss_type="nll",
        label_smoothing_factor=0.0,
        neftune_noise_alpha=None,
    )
    configuration: Any = SimpleNamespace(
        training=training,
        model=model,
        selection=SelectionArguments(method=method, **selection),
        build_policy=lambda: build_policy(method, chosen),
        taking_part="layers",
        elements=SimpleNamespace(elements=None),
        zero_stage=2,
        dtype="float32",
    )
    return describe_settings(configuration, Dataset.from_dict({"prompt": ["w1"], "completion": ["w2"]}))


def test_full_fine_tuning_does_not_mention_what_it_does_not_read() -> None:
    changed = {"select_fraction": 0.5, "selection_seed": 7}
    assert described("full") == described("full", **changed)
    assert described("topk") != described("topk", **changed)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        (
            {"lora_alpha": 32},
            "adapters was LoRA of rank 8 with alpha 16 and is LoRA of rank 8 with alpha 32 now (",
        ),
        ({"lora_r": 4}, "and is LoRA of rank 4 with alpha 16 now"),
        ({"use_dora": True}, "and is DoRA of rank 8 with alpha 16 now"),
        ({"use_rslora": True}, "and is LoRA of rank 8 with alpha 16 over the root of the rank now (--use_peft, "),
        (
            {"use_peft": False},
            "adapters was LoRA of rank 8 with alpha 16 and is none now (--use_peft, --use_dora",
        ),
    ],
)
def test_other_adapters_than_those_of_the_checkpoint_are_refused(changed: dict[str, Any], words: str) -> None:
    """What scales them is in no shape of a weight."""
    saved = described("topk", SimpleNamespace(**ADAPTERS))
    with pytest.raises(UserError, match=re.escape(words)):
        compare(saved, described("topk", SimpleNamespace(**ADAPTERS | changed)))


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"model": SimpleNamespace(**ADAPTERS | {"lora_dropout": 0.1})}, "dropout 0.1 in adapters now"),
        ({"fold_adapters": True}, "folded adapters was False and is True now"),
        ({"choose_early": True}, "early choice was False and is True now"),
    ],
)
def test_what_takes_effect_from_here_on_is_said(changed: dict[str, Any], words: str) -> None:
    adapters = {"model": SimpleNamespace(**ADAPTERS)}
    (line,) = compare(described("topk", **adapters), described("topk", **adapters | changed))
    assert f"{words}: takes effect from here on (--" in line


def test_a_checkpoint_that_does_not_say_a_setting_goes_on() -> None:
    """One of an earlier version."""
    now = described("topk", SimpleNamespace(**ADAPTERS))
    assert compare({name: value for name, value in now.items() if name not in ("adapters", "noise")}, now) == []


@pytest.mark.parametrize(("rows", "hashed"), [(1, 1), (999, 999), (1999, 1999), (2000, 1000), (2999, 1500)])
def test_the_fingerprint_reads_a_bounded_number_of_rows(rows: int, hashed: int) -> None:
    """Checkpoints hold it: another choice of rows would refuse them."""
    read: list[int] = []

    class Rows(Dataset):
        def select(self, indices: Any, **options: Any) -> Dataset:
            read.extend(indices)
            return super().select(indices, **options)

    fingerprint_of_rows(Rows(Dataset.from_dict({"input_ids": [[1]] * rows}).data))
    assert len(read) == hashed
