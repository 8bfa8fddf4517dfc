"""What a run is configured to do: its settings by who reads them, completed, and as they are written down."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import torch
import yaml
from deepspeed.accelerator import get_accelerator
from torch import nn
from transformers import get_scheduler
from transformers.integrations import get_available_reporting_integrations
from trl import ModelConfig, ScriptArguments, SFTConfig

from agsel.blocks import Block, find_blocks, require_scope, taking_part
from agsel.data.fields import Fields
from agsel.errors import UserError, one_line
from agsel.policies import Policy
from agsel.replacing import replace_file
from agsel.runs.folder import ABOUT_SETTINGS, SETTINGS
from agsel.training.arguments import (
    DataArguments,
    ElementArguments,
    OutputArguments,
    SafetyArguments,
    SelectionArguments,
    TaskArguments,
)
from agsel.training.attachment import require_adamw
from agsel.training.methods import build_policy, policy_class
from agsel.training.model import agree_on_settings
from agsel.training.settings import Settings

STEPS_TRIED = 1000
COMPARED = (
    "model_name_or_path",
    "dataset_name",
    "learning_rate",
    "lr_scheduler_type",
    "weight_decay",
    "num_train_epochs",
    "max_steps",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "seed",
    "select_from",
    "use_peft",
    "lora_r",
    "elements",
    "element_density",
)
"""Besides the method, its settings and the ZeRO stage."""


@dataclass(frozen=True)
class Configuration:
    """All settings of a run, by who reads them.

    Attributes:
        resolved: all of them by name as plain YAML values, the content of the DeepSpeed file among them.
        ignored: what the file of `--config` sets and the method does not read.
    """

    script: ScriptArguments
    training: SFTConfig
    model: ModelConfig
    selection: SelectionArguments
    elements: ElementArguments
    fields: Fields
    data: DataArguments
    tasks: TaskArguments
    output: OutputArguments
    safety: SafetyArguments
    resolved: dict[str, Any]
    ignored: dict[str, Any]

    @property
    def zero_stage(self) -> int:
        """The ZeRO stage of the DeepSpeed configuration."""
        return self.training.hf_deepspeed_config.config["zero_optimization"]["stage"]

    @property
    def dtype(self) -> str:
        """The type of training, whatever that of the weights that are loaded, `--dtype`."""
        return "bfloat16" if self.training.bf16 else "float16" if self.training.fp16 else "float32"

    @property
    def taking_part(self) -> Literal["layers", "all"]:
        """`select_blocks`, or what the method takes where it is left open."""
        scope = policy_class(self.selection.method).scope(self.selection.select_from)
        return cast(Literal["layers", "all"], self.selection.select_blocks or scope)

    def blocks_of(self, model: nn.Module) -> list[Block]:
        """The blocks of a model that take part.

        Raises:
            UserError: as of `agsel.blocks.taking_part`.
        """
        return taking_part(find_blocks(model), self.taking_part, self.selection.select_from)

    def build_policy(self) -> Policy:
        """The policy that the settings describe."""
        return build_policy(self.selection.method, self.resolved)

    def compared_settings(self, policy: Policy) -> dict[str, Any]:
        """Those by which people compare runs, as far as they say something of this run.

        Args:
            policy: of the run, with nothing left open.
        """
        without = {
            "num_train_epochs": self.training.max_steps > 0,
            "max_steps": self.training.max_steps <= 0,
            "lora_r": not self.model.use_peft,
            "element_density": self.elements.elements is None,
        }
        names = [name for name in COMPARED if not without.get(name) and self.resolved.get(name) is not None]
        method = {"method": self.selection.method, "stage": self.zero_stage}
        return {name: self.resolved[name] for name in names} | policy.settings() | method


def configure(settings: Settings) -> Configuration:
    """Sort and complete the settings. Starts `torch.distributed`, as `TrainingArguments` does.

    Raises:
        UserError: settings contradict each other; the message names them.
    """
    configuration = Configuration(
        settings.group(ScriptArguments),
        settings.group(SFTConfig),
        settings.group(ModelConfig),
        settings.group(SelectionArguments),
        settings.group(ElementArguments),
        settings.group(Fields),
        settings.group(DataArguments),
        settings.group(TaskArguments),
        settings.group(OutputArguments),
        settings.group(SafetyArguments),
        settings.values,
        settings.ignored,
    )
    _complete(configuration)
    return configuration


def write_configuration(configuration: Configuration) -> Path:
    """Write the resolved settings to `<output_dir>/config.yaml`, which `--config` reads again."""
    path = Path(configuration.training.output_dir, SETTINGS)
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, ABOUT_SETTINGS + yaml.safe_dump(configuration.resolved))
    return path


def smooths_labels(training: SFTConfig) -> bool:
    """Whether TRL smooths the labels, by the logits of all tokens; it does for its default loss."""
    return training.label_smoothing_factor > 0 and training.loss_type == "nll"


def _complete(configuration: Configuration) -> None:
    """Derive what the user left open, and check what depends on several groups."""
    training, model = configuration.training, configuration.model
    agree_on_settings(model, training)
    model.dtype = model.dtype or configuration.dtype
    if configuration.dtype == "float32" and model.dtype != "float32":
        raise UserError(f"--dtype {model.dtype} cannot train in fp32: leave it out, or set --bf16 or --fp16")
    if model.dtype not in (configuration.dtype, "float32", "auto"):
        raise UserError(
            f"--dtype {model.dtype} would round the weights before they are trained in {configuration.dtype}: leave it "
            "out, it is of the weights that are loaded"
        )
    _require_types(training)
    _require_optimizer(training)
    require_scope(configuration.taking_part, configuration.selection.select_from)
    method = configuration.selection.method
    if configuration.elements.elements is not None:
        _require_plain_weights(model)
    _require_adapters(configuration)
    if policy_class(method).asks_for_losses() and smooths_labels(training):
        raise UserError(
            f"--method {method} asks the model for losses, and with --label_smoothing_factor the trainer makes "
            "them: leave it out"
        )
    if configuration.selection.fold_adapters:
        _require_foldable(model)
    if configuration.selection.choose_early and training.gradient_accumulation_steps == 1:
        raise UserError(
            "--choose_early chooses by the first of several micro-batches: raise --gradient_accumulation_steps, or "
            "leave it out"
        )
    if configuration.selection.choose_early and "explore" not in configuration.build_policy().kinds_of_steps:
        raise UserError(
            f"--choose_early has no effect with --method {method}, which never chooses by gradients as it is set: "
            "leave it out"
        )
    if configuration.selection.compile_layers:
        _prepare_compilation(configuration)
    missing = sorted(set(training.report_to) - set(get_available_reporting_integrations()))
    if missing:
        raise UserError(f"{missing[0]} is not installed: install it, or leave it out (--report_to)")
    mismatches = [line.removeprefix("- ") for line in training.hf_deepspeed_config.mismatches]
    if mismatches:
        raise UserError(
            f"the DeepSpeed configuration (--deepspeed) contradicts other settings ({', '.join(mismatches)}): "
            'write "auto" for these values'
        )
    if training.ddp_timeout < configuration.safety.rank_timeout:
        raise UserError(
            f"--ddp_timeout {training.ddp_timeout} is less than --rank_timeout {configuration.safety.rank_timeout:g}: "
            "ranks would stop waiting for a silent one before it can be named"
        )
    training.resume_from_checkpoint = _wanted_checkpoint(training.resume_from_checkpoint)


def _require_plain_weights(model: ModelConfig) -> None:
    """Single weights are trained in the model's own layers."""
    for name in ("use_peft", "load_in_4bit", "load_in_8bit"):
        if getattr(model, name):
            raise UserError(f"--elements trains single weights of the model itself: leave out --{name}, or --elements")


def _require_foldable(model: ModelConfig) -> None:
    """`--fold_adapters` would be without effect on other adapters, which PEFT computes."""
    if model.lora_dropout:
        raise UserError(
            f"--fold_adapters computes without dropout, and --lora_dropout is {model.lora_dropout:g}: set it to 0, or "
            "leave out --fold_adapters"
        )
    for name in ("use_dora", "load_in_4bit", "load_in_8bit"):
        if getattr(model, name):
            raise UserError(f"--fold_adapters is for LoRA on ordinary weights: leave out --{name}, or --fold_adapters")


def _require_adapters(configuration: Configuration) -> None:
    """Without `--use_peft` nothing may need it."""
    if configuration.model.use_peft:
        return
    method = configuration.selection.method
    if policy_class(method).needs_adapters:
        raise UserError(
            f"--method {method} trains LoRA or DoRA adapters: add --use_peft, best with --lora_target_modules "
            "all-linear, or use another method"
        )
    for holder, name in ((configuration.output, "merge_adapter"), (configuration.selection, "fold_adapters")):
        if getattr(holder, name):
            raise UserError(f"--{name} is for adapters, and there are none: add --use_peft, or leave it out")
    for name in ("load_in_4bit", "load_in_8bit"):
        if getattr(configuration.model, name):
            raise UserError(f"--{name} leaves weights that only adapters can train: add --use_peft, or leave it out")


def _require_types(training: SFTConfig) -> None:
    """The type of training, and that of evaluations, in which DeepSpeed would be told to train, too."""
    if training.fp16 and not get_accelerator().is_fp16_supported():
        raise UserError("DeepSpeed does not train in fp16 on this device: leave out --fp16, or set --bf16")
    for trained, evaluated in (("bf16", "bf16_full_eval"), ("fp16", "fp16_full_eval")):
        if getattr(training, evaluated) and not getattr(training, trained):
            raise UserError(
                f"--{evaluated} would make DeepSpeed train in that type: leave it out, evaluations have the type of "
                f"training, or set --{trained}"
            )


def _require_optimizer(training: SFTConfig) -> None:
    """Make optimizer and schedule like those of the run, which are made after everything else."""
    require_adamw(training)
    try:
        optimizer = torch.optim.AdamW(
            [torch.nn.Parameter(torch.zeros(1))],
            lr=training.learning_rate,
            betas=(training.adam_beta1, training.adam_beta2),
            eps=training.adam_epsilon,
        )
    except ValueError as error:
        raise UserError(
            f"AdamW does not take --adam_beta1, --adam_beta2 or --adam_epsilon: {one_line(error)}"
        ) from error
    steps = max(training.max_steps, STEPS_TRIED)
    try:
        get_scheduler(
            training.lr_scheduler_type,
            optimizer,
            num_warmup_steps=training.get_warmup_steps(steps),
            num_training_steps=steps,
            scheduler_specific_kwargs=training.lr_scheduler_kwargs,
        )
    except Exception as error:  # whatever a schedule stumbles over
        raise UserError(
            f"cannot make the schedule --lr_scheduler_type {training.lr_scheduler_type.value} with "
            f"--lr_scheduler_kwargs {json.dumps(training.lr_scheduler_kwargs or {}, default=str)}: {one_line(error)}"
        ) from error


def _prepare_compilation(configuration: Configuration) -> None:
    if configuration.zero_stage == 3:
        raise UserError(
            "--compile_layers does not work at ZeRO-3, which gathers the weights inside the layers: use stage 1 or 2 "
            "(--deepspeed), or leave it out"
        )
    if policy_class(configuration.selection.method).needs_adapters:
        raise UserError(
            f"--method {configuration.selection.method} scales adapters for a moment, and every factor would be "
            "compiled anew: leave out --compile_layers"
        )
    if configuration.training.use_liger_kernel:
        raise UserError(
            "torch.compile cannot trace Liger's kernels: leave out --use_liger_kernel or --compile_layers (TRL's own "
            "chunked loss, which saves the memory of the logits, works with both)"
        )


def _wanted_checkpoint(wanted: str | None) -> str | None:
    """A folder, `auto`, `true`, or none; `agsel.runs.resume.find_checkpoint` says what they mean."""
    if wanted is None or str(wanted).lower() == "false":
        return None
    if str(wanted).lower() in ("auto", "true"):
        return str(wanted).lower()
    if not os.path.isdir(wanted):
        raise UserError(f"no such checkpoint folder: {wanted} (--resume_from_checkpoint)")
    return str(wanted)
