"""Settings, most of TRL and transformers, that a run would take and not heed: refused, with what to do instead."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import fields
from typing import Any

from trl import ModelConfig, ScriptArguments, SFTConfig

from agsel.errors import UserError
from agsel.training.arguments import ElementArguments, TaskArguments

UPSTREAM = (ScriptArguments, SFTConfig, ModelConfig)

DDP = "is for DistributedDataParallel, in whose place DeepSpeed trains: leave it out"
OTHER_DIVISION = "divides the model in another way than DeepSpeed does: leave it out, ZeRO divides it (--deepspeed)"
OTHER_OPTIMIZER = "is for other optimizers than AdamW: leave it out"
NEVER = {
    "accelerator_config": "would divide batches otherwise than the run says it does: leave it out",
    "auto_find_batch_size": "would begin anew with other steps when memory ends: leave it out, and set "
    "--per_device_train_batch_size to what the memory plan says fits",
    "dataset_kwargs": "is for tokens of TRL's making, and agsel makes them: leave it out",
    "dataset_text_field": "is not read: name the column that is learnt with --completion_field",
    "ddp_backend": DDP,
    "ddp_broadcast_buffers": DDP,
    "ddp_bucket_cap_mb": DDP,
    "ddp_find_unused_parameters": DDP,
    "ddp_static_graph": DDP,
    "do_predict": "is nothing that a run does: leave it out, and measure the trained model with launch/evaluate.py",
    "enable_jit_checkpoint": "would take SIGTERM from agsel, which saves the run then: leave it out",
    "fsdp": OTHER_DIVISION,
    "fsdp_config": OTHER_DIVISION,
    "ignore_bias_buffers": DDP,
    "ignore_data_skip": "would let a resumed run begin with rows that it has seen: leave it out",
    "label_names": "is not read, labels are called labels: leave it out",
    "lora_task_type": "makes adapters that are not loaded as a language model's: leave it out",
    "optim_args": OTHER_OPTIMIZER,
    "optim_target_modules": OTHER_OPTIMIZER,
    "save_on_each_node": "would write every file once more from each host: leave it out, all hosts see the run folder",
    "save_only_model": "would make checkpoints that cannot be resumed: leave it out, the trained model is written to "
    "model/ anyway",
}
"""What is refused with any value that asks for something."""
NEEDS = {
    "use_peft": (
        "add --use_peft",
        (
            *("lora_r", "lora_alpha", "lora_dropout", "lora_target_modules", "lora_target_parameters"),
            *("lora_modules_to_save", "use_rslora", "use_dora"),
        ),
    ),
    "load_in_4bit": ("add --load_in_4bit", ("bnb_4bit_quant_type", "bnb_4bit_quant_storage", "use_bnb_nested_quant")),
    "use_liger_kernel": ("add --use_liger_kernel", ("liger_kernel_config",)),
    "eval_strategy": (
        "set --eval_strategy to steps or epoch",
        (
            *("do_eval", "eval_steps", "eval_delay", "load_best_model_at_end", "metric_for_best_model"),
            "greater_is_better",
        ),
    ),
    "packing": ("add --packing", ("packing_strategy",)),
    "push_to_hub": ("add --push_to_hub", ("hub_model_id", "hub_revision", "hub_private_repo")),
    "elements": ("add --elements", ("element_density", "element_samples")),
    "eval_tasks": ("add --eval_tasks", ("eval_task_rows", "eval_max_new_tokens")),
}
"""What is read only with another setting: that setting, how to set it, and what needs it."""
OF_EVALUATIONS = {"eval_on_start": True, "save_strategy": "best"}
"""With these values a run without evaluations would fail, or never save."""
DEFAULTS = {
    field.name: field.default for group in (*UPSTREAM, ElementArguments, TaskArguments) for field in fields(group)
}


def require_heeded(
    values: Mapping[str, Any],
    defaults: Mapping[str, Any],
    on_command_line: Collection[str],
    in_file: Collection[str],
) -> None:
    """Refuse settings that the run would not heed.

    What is of no use without another setting is accepted where the user has turned that one off: on the command line,
    or beside it in the file of `--config`.

    Args:
        values: all settings by name.
        defaults: of those whose default is not that of `DEFAULTS`.
        on_command_line: names of those that stand there.
        in_file: names of those that stand in the file of `--config`.

    Raises:
        UserError: names the first such setting, and the remedy.
    """
    for name, reason in NEVER.items():
        if _asks(name, values, defaults):
            raise UserError(f"--{name} {reason}")
    for switch, (remedy, names) in NEEDS.items():
        if not _is_off(switch, values):
            continue
        for name in names:
            is_left = switch in on_command_line or (switch in in_file and name not in on_command_line)
            if _asks(name, values, defaults) and not is_left:
                raise UserError(f"--{name} has no effect as it stands: {remedy}, or leave it out")
    _require_evaluations(values)
    if values["label_smoothing_factor"] and values["loss_type"] == "dft":
        raise UserError("--label_smoothing_factor has no effect with --loss_type dft: leave one of them out")
    if values["dataloader_persistent_workers"] and not values["dataloader_num_workers"]:
        raise UserError("--dataloader_persistent_workers has none to keep: add --dataloader_num_workers")
    if not values["dataloader_in_order"]:
        raise UserError(
            "--dataloader_in_order false gives batches to steps as they come, and a resumed run would repeat some and "
            "miss others: leave it out"
        )
    if values["activation_offloading"] and values["use_cpu"]:
        raise UserError("--activation_offloading moves activations off a GPU, and there is none: leave it out")


def _is_off(switch: str, values: Mapping[str, Any]) -> bool:
    is_on_in_evaluations = switch == "packing" and values["eval_packing"]
    return values[switch] in (False, None, "no") and not is_on_in_evaluations


def _asks(name: str, values: Mapping[str, Any], defaults: Mapping[str, Any]) -> bool:
    """Whether a setting asks for anything: `--ddp_find_unused_parameters false` does not."""
    return values[name] != {**DEFAULTS, **defaults}[name] and bool(values[name])


def _require_evaluations(values: Mapping[str, Any]) -> None:
    for name, value in OF_EVALUATIONS.items():
        if values["eval_strategy"] == "no" and values[name] == value:
            raise UserError(
                f"--{name} {str(value).lower()} needs evaluations, and there are none: set --eval_strategy to steps or "
                "epoch, or leave it out"
            )
