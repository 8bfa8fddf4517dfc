"""Settings of TRL and transformers that a run would take and not heed are refused, in one line that says what to do."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import yaml
from deepspeed.accelerator import get_accelerator

from agsel.errors import UserError
from agsel.training.configuration import configure
from agsel.training.settings import Settings, read_settings
from agsel.training.unheeded import DEFAULTS, NEEDS, NEVER

Read = Callable[..., Settings]
OF_AGSEL = {"deepspeed": "zero2", "use_cpu": True, "dtype": None, "lora_dropout": 0.0}

pytestmark = pytest.mark.usefixtures("untouched_environment")


@pytest.fixture
def read(tmp_path: Path) -> Read:
    """Settings of a command line, and of a file with these."""

    def of(*words: object, **in_file: Any) -> Settings:
        path = tmp_path / "settings.yaml"
        given = {"model_name_or_path": "some/model", "output_dir": str(tmp_path / "run"), "bf16": False}
        path.write_text(yaml.safe_dump(given | in_file))
        return read_settings(["--config", str(path), *map(str, words)], OF_AGSEL)

    return of


def refused(run: Callable[[], object], *words: str) -> None:
    with pytest.raises(UserError) as refusal:
        run()
    assert "\n" not in str(refusal.value)
    for part in words:
        assert part in str(refusal.value)


ASKED: dict[str, Any] = {
    "accelerator_config": {"split_batches": True},
    "dataset_kwargs": {"skip_prepare_dataset": True},
    "dataset_text_field": "content",
    "ddp_backend": "gloo",
    "ddp_bucket_cap_mb": 25,
    "fsdp": "full_shard",
    "fsdp_config": {"min_num_params": 1},
    "label_names": ["labels"],
    "lora_task_type": "SEQ_CLS",
    "optim_args": "momentum_dtype=bfloat16",
    "optim_target_modules": "all-linear",
}
"""What asks for something, of the settings that are not switches."""


@pytest.mark.parametrize("name", NEVER)
def test_what_is_never_heeded_is_refused_by_name(read: Read, name: str) -> None:
    refused(
        lambda: read(**{name: ASKED.get(name, True)}), f"--{name} ", ": leave it out" * (name != "dataset_text_field")
    )


@pytest.mark.parametrize("name", NEVER)
def test_what_asks_for_nothing_is_accepted(read: Read, name: str) -> None:
    """As `ddp_find_unused_parameters: false`, which many files have."""
    read(**{name: DEFAULTS[name]})
    if name not in ASKED:
        read(**{name: False})


VALUES: dict[str, Any] = {
    "bnb_4bit_quant_storage": "uint8",
    "bnb_4bit_quant_type": "fp4",
    "eval_delay": 2,
    "eval_steps": 5,
    "element_density": 0.5,
    "element_samples": 10,
    "eval_max_new_tokens": 8,
    "eval_task_rows": 10,
    "hub_model_id": "me/mine",
    "hub_revision": "main",
    "liger_kernel_config": {"rope": False},
    "lora_alpha": 8,
    "metric_for_best_model": "loss",
    "lora_dropout": 0.05,
    "lora_modules_to_save": ["lm_head"],
    "lora_r": 8,
    "lora_target_modules": ["q_proj"],
    "lora_target_parameters": ["weight"],
    "packing_strategy": "wrapped",
}
SWITCHED_OFF = {"eval_strategy": "no", "elements": None, "eval_tasks": None}
DEPENDENT = [(switch, name) for switch, (_, names) in NEEDS.items() for name in names]


@pytest.mark.parametrize(("switch", "name"), DEPENDENT)
def test_what_needs_another_setting_is_refused_without_it(read: Read, switch: str, name: str) -> None:
    refused(lambda: read(**{name: VALUES.get(name, True)}), f"--{name} has no effect as it stands", f"--{switch}")


@pytest.mark.parametrize(("switch", "name"), DEPENDENT)
def test_what_the_user_has_turned_off_needs_nothing(read: Read, switch: str, name: str) -> None:
    """A recipe with adapters trains without them by `--use_peft false`; `config.yaml` names every setting."""
    off, given = SWITCHED_OFF.get(switch, False), {name: VALUES.get(name, True)}
    if off is not None:
        assert not read("--" + switch, off, **given).values[switch] or off == "no"
    read(**given, **{switch: off})


def test_rows_that_are_packed_for_evaluations_alone_have_a_strategy(read: Read) -> None:
    read(packing_strategy="wrapped", eval_packing=True)
    refused(
        lambda: read(packing_strategy="wrapped", eval_packing=False), "--packing_strategy has no effect", "--packing"
    )


def test_what_the_command_line_adds_to_a_file_is_heeded_or_refused(read: Read) -> None:
    refused(lambda: read("--lora_r", 8, use_peft=False), "--lora_r has no effect as it stands: add --use_peft")
    assert read("--lora_r", 8, use_peft=True).values["lora_r"] == 8


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"eval_on_start": True, "eval_strategy": "no"}, "--eval_on_start true needs evaluations"),
        ({"save_strategy": "best"}, "--save_strategy best needs evaluations"),
        ({"label_smoothing_factor": 0.1, "loss_type": "dft"}, "--label_smoothing_factor has no effect with --loss_"),
        ({"activation_offloading": True}, "--activation_offloading moves activations off a GPU"),
        ({"use_cpu": False}, "use_cpu is false, and DeepSpeed trains without a GPU: leave it out"),
        ({"max_grad_norm": -1}, "max_grad_norm must be 0 or more, got -1 (--max_grad_norm)"),
        ({"weight_decay": -0.1}, "weight_decay must be 0 or more"),
        ({"weight_decay": math.inf}, "weight_decay must be 0 or more, got inf (--weight_decay)"),
        ({"neftune_noise_alpha": -1}, "neftune_noise_alpha must be 0 or more"),
        ({"dataloader_num_workers": -1}, "dataloader_num_workers must be 0 or more"),
        ({"dataloader_persistent_workers": True}, "has none to keep: add --dataloader_num_workers"),
        ({"ignore_data_skip": True}, "--ignore_data_skip would let a resumed run begin with rows that it has seen"),
        ({"dataloader_in_order": False}, "--dataloader_in_order false gives batches to steps as they come"),
        ({"seed": 2**32}, "seed must be 4294967295 or less, got 4294967296 (--seed)"),
        ({"save_steps": 0}, "save_steps must be above 0, got 0: --save_strategy no turns it off"),
        ({"eval_strategy": "steps", "eval_steps": -3}, "eval_steps must be above 0, got -3"),
        (
            {"model_init_kwargs": "attn_implementation=eager"},
            "write a JSON object, as '{\"name\": 1}' (--mod",
        ),
        ({"gradient_checkpointing_kwargs": '{"use_reentrant": }'}, "write a JSON object"),
        ({"label_smoothing_factor": -0.1}, "label_smoothing_factor must be 0 or more and below 1, got -0.1"),
        ({"label_smoothing_factor": 1.0}, "label_smoothing_factor must be 0 or more and below 1, got 1.0 (--label_"),
        ({"use_peft": True, "lora_dropout": 1.0}, "lora_dropout must be 0 or more and below 1"),
        ({"use_peft": True, "lora_alpha": 0}, "lora_alpha must be 1 or more, got 0 (--lora_alpha)"),
        ({"use_peft": True, "lora_r": 0}, "lora_r must be 1 or more"),
        ({"packing_strategy": "wrapped"}, "--packing_strategy has no effect as it stands: add --packing"),
    ],
)
def test_what_contradicts_the_run_is_refused(read: Read, changed: dict[str, Any], words: str) -> None:
    refused(lambda: read(**changed), words)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"adam_beta1": 1.5}, "AdamW does not take --adam_beta1"),
        ({"adam_epsilon": -1}, "AdamW does not take --adam_beta1, --adam_beta2 or --adam_epsilon: Invalid epsilon"),
        (
            {"bf16": True, "dtype": "float16"},
            "--dtype float16 would round the weights before they are trained in bf",
        ),
        ({"bf16_full_eval": True}, "--bf16_full_eval would make DeepSpeed train in that type"),
        ({"bf16": True, "fp16_full_eval": True}, "--fp16_full_eval would make DeepSpeed train in that type"),
        ({"load_in_4bit": True}, "--load_in_4bit leaves weights that only adapters can train: add --use_peft"),
    ],
)
def test_what_would_train_otherwise_is_refused(read: Read, changed: dict[str, Any], words: str) -> None:
    refused(lambda: configure(read(**changed)), words)


@pytest.mark.parametrize("supported", [False, True])
def test_fp16_is_refused_where_deepspeed_has_none(read: Read, supported: bool) -> None:
    with mock.patch.object(type(get_accelerator()), "is_fp16_supported", return_value=supported):
        if supported:
            configure(read(fp16=True))
        else:
            refused(lambda: configure(read(fp16=True)), "DeepSpeed does not train in fp16 on this device", "--fp16")


@pytest.mark.parametrize("dtype", ["float32", "auto", None])
def test_a_run_says_the_type_in_which_it_trains(read: Read, dtype: str | None) -> None:
    assert configure(read(bf16=True, dtype=dtype)).dtype == "bfloat16"


def test_evaluations_in_the_type_of_training_are_accepted(read: Read) -> None:
    assert configure(read(bf16=True, bf16_full_eval=True)).training.bf16_full_eval


def test_a_debug_option_is_written_down_as_it_was_given(read: Read) -> None:
    assert read("--debug", "underflow_overflow").values["debug"] in ("underflow_overflow", ["underflow_overflow"])
