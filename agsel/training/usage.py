"""What `--help` prints: how to start, agsel's own settings, and those of TRL and transformers that most runs need.

`--help all` prints all of these. Their words are upstream's, but for settings that mean something else here.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterable, Mapping
from typing import Any, get_type_hints

from transformers import HfArgumentParser

from agsel.data.fields import Fields
from agsel.policies import Policy
from agsel.training.arguments import (
    DataArguments,
    ElementArguments,
    OutputArguments,
    SafetyArguments,
    SelectionArguments,
    TaskArguments,
)
from agsel.training.methods import method_arguments
from agsel.training.unheeded import NEVER, UPSTREAM

START = """usage: deepspeed [--num_gpus N] launch/train.py [--config RECIPE] [--SETTING VALUE ...]

  deepspeed --num_gpus 4 launch/train.py --config qwen2.5-0.5b-gsm8k
  deepspeed --num_gpus 4 launch/train.py --config my_recipe.yaml --method topk
  deepspeed --num_gpus 4 launch/train.py --config RUN_FOLDER/config.yaml --resume_from_checkpoint auto
  python launch/train.py --config demo     # one process; without a GPU after `export DS_ACCELERATOR=cpu`

A setting stands here, or in the YAML file by its name without the dashes; here it wins.
"""
MORE = "\nAll settings of TRL and transformers: --help all\n"
OWN = (SelectionArguments, ElementArguments, Fields, DataArguments, TaskArguments, OutputArguments, SafetyArguments)
MOST_USED = {
    "model": ("model_name_or_path", "dtype", "attn_implementation", "chat_template_path", "use_liger_kernel"),
    "adapters": ("use_peft", "lora_r", "lora_alpha", "lora_target_modules"),
    "data": (
        *("dataset_name", "dataset_config", "dataset_train_split", "dataset_test_split", "max_length", "packing"),
        *("completion_only_loss", "assistant_only_loss", "dataset_num_proc"),
    ),
    "training": (
        *("deepspeed", "bf16", "fp16", "gradient_checkpointing", "num_train_epochs", "max_steps"),
        *("per_device_train_batch_size", "gradient_accumulation_steps", "learning_rate", "lr_scheduler_type"),
        *("warmup_steps", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm", "seed"),
    ),
    "run folder and output": (
        *("output_dir", "save_strategy", "save_steps", "save_total_limit", "resume_from_checkpoint", "logging_steps"),
        *("report_to", "eval_strategy", "eval_steps", "per_device_eval_batch_size"),
    ),
}
"""Settings of TRL and transformers by what they are about."""
WORDS = {name: f"Refused: it {reason}." for name, reason in NEVER.items()} | {
    "assistant_only_loss": "Of conversations, learn only what the assistant says. Default: true.",
    "completion_only_loss": "Learn only the completion of a row with a prompt. Default: true.",
    "dataset_name": "Hub name, folder or file (.json, .jsonl, .csv, .tsv, .parquet) to train on.",
    "dataset_streaming": "Refused: agsel checks every row before it trains.",
    "ddp_timeout": "Seconds that ranks which all answer (see `--rank_timeout`) wait for each other.",
    "deepspeed": "ZeRO stage `zero1`, `zero2` or `zero3`, or a file with DeepSpeed's settings as JSON, or that JSON.",
    "dtype": "Of the weights that are loaded. Default: that of training, by `--bf16` and `--fp16`.",
    "max_length": "Tokens of a row; longer ones are cut at their end. With `--packing`, tokens of a sequence.",
    "max_steps": "Optimizer steps, instead of `--num_train_epochs`.",
    "max_grad_norm": "Largest norm of the gradient of the blocks that a step updates; 0 clips nothing.",
    "model_name_or_path": "Hub name or folder of the model to start from.",
    "optim": "`adamw_torch_fused` or `adamw_torch`, which are torch's AdamW; others are refused.",
    "output_dir": "Run folder, one for each run: checkpoints, TensorBoard, settings, the trained model.",
    "resume_from_checkpoint": "`auto` goes on from the newest complete checkpoint of the run folder, and starts from "
    "the beginning if there is none; `true` wants one; a folder is that checkpoint.",
    "weight_decay": "Of AdamW. It acts on all weights of a block that is updated, norms and biases included.",
}
"""Settings that are not what upstream says."""


def describe(policy: type[Policy], defaults: Mapping[str, Any], *, everything: bool) -> str:
    """What `--help` prints.

    Args:
        policy: the method of the run.
        defaults: settings whose default differs from TRL's.
        everything: all settings of TRL and transformers instead of those that most runs need.
    """
    taken = {field.name for group in (*UPSTREAM, *OWN) for field in dataclasses.fields(group)}
    groups = [OWN[0], method_arguments(policy, taken), *OWN[1:]]
    if everything:
        groups += [_group(f"{group.__name__} of TRL", [group]) for group in UPSTREAM]
    else:
        groups += [_group(title, UPSTREAM, names) for title, names in MOST_USED.items()]
    parser = HfArgumentParser(groups, usage="", add_help=False)
    parser.set_defaults(**defaults)
    _, _, settings = parser.format_help().partition("\n\n")
    return START + "\n" + settings + ("" if everything else MORE)


def _group(title: str, owners: Iterable[type], names: Collection[str] | None = None) -> type:
    """Some settings, or all, as a group of their own with agsel's words."""
    fields = [
        (field.name, hints[field.name], _in_own_words(field))
        for owner in owners
        for hints in [get_type_hints(owner)]
        for field in dataclasses.fields(owner)
        if field.init and (names is None or field.name in names)
    ]
    if names is not None:
        fields.sort(key=lambda field: [*names].index(field[0]))
    return dataclasses.make_dataclass("Group", fields, kw_only=True, namespace={"_argument_group_name": title})


def _in_own_words(field: dataclasses.Field[Any]) -> Any:
    metadata = {**field.metadata, "help": WORDS.get(field.name, field.metadata.get("help"))}
    if field.default_factory is not dataclasses.MISSING:
        return dataclasses.field(default_factory=field.default_factory, metadata=metadata)
    return dataclasses.field(default=field.default, metadata=metadata)
