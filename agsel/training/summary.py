"""The arithmetic of a run, printed before it starts: batch, steps, blocks, and what is trained."""

import math
from collections.abc import Sequence
from typing import NamedTuple

from torch import nn
from transformers import Trainer

from agsel import upstream
from agsel.blocks import Block, find_blocks
from agsel.errors import UserError
from agsel.monitor import block_ranges
from agsel.policies import AdaGradSelect, Policy
from agsel.training.configuration import Configuration
from agsel.zero.parameters import block_infos, global_numel

ROWS_MEASURED = 1000
OVER_ADAPTERS = (
    "over adapters AdaGradSelect has learnt less than LoRA on both tasks of agsel's study (tools/quality): "
    "--method full trains all of them, freezeout two thirds on average"
)
"""By 0.012 and 0.021 nats, three seeds each."""


class Steps(NamedTuple):
    """Optimizer steps of a run."""

    per_epoch: int
    total: int


def count_steps(trainer: Trainer) -> Steps:
    """How many optimizer steps `trainer.train()` will do.

    Raises:
        RunError: this transformers differs from the tested one where it counts them.
    """
    upstream.require_tested(__name__)
    values = trainer.set_initial_training_values(trainer.args, trainer.get_train_dataloader())
    _, per_epoch, *_, total = values
    return Steps(per_epoch, total)


def require_step(trainer: Trainer, steps: Steps) -> None:
    """Refuse a run that would train nothing.

    Raises:
        UserError: no batch is complete, and incomplete ones are dropped.
    """
    if steps.total < 1 or not len(trainer.get_train_dataloader()):
        arguments = trainer.args
        raise UserError(
            f"no optimizer step: {len(trainer.train_dataset)} sequences fill no batch of "
            f"{arguments.per_device_train_batch_size} on each of {arguments.world_size} ranks, and "
            "--dataloader_drop_last drops incomplete ones: lower --per_device_train_batch_size, or leave it out"
        )


def describe_run(configuration: Configuration, trainer: Trainer, policy: Policy, steps: Steps) -> str:
    """A few lines that say what will happen, for the user to check before waiting for it."""
    arguments = configuration.training
    examples = arguments.per_device_train_batch_size * arguments.gradient_accumulation_steps * arguments.world_size
    ranks = f"{arguments.world_size} rank{'s' if arguments.world_size > 1 else ''}"
    model, sequences = configuration.model.model_name_or_path, len(trainer.train_dataset)
    return "\n".join(
        [
            f"engine    ZeRO-{configuration.zero_stage}, {configuration.dtype}, {ranks}",
            f"model     {model}: {global_numel(trainer.model.parameters()):,} parameters",
            *_describe_blocks(trainer.model, configuration, policy, steps.total),
            f"batch     {arguments.per_device_train_batch_size} examples x {arguments.gradient_accumulation_steps} "
            f"accumulation x {ranks} = {examples} examples or about {round(examples * _mean_length(trainer)):,} tokens "
            "per step",
            f"steps     {steps.per_epoch:,} per epoch of {sequences:,} sequences, {steps.total:,} in all",
            f"output    {arguments.output_dir}",
        ]
    )


def _describe_blocks(model: nn.Module, configuration: Configuration, policy: Policy, steps: int) -> list[str]:
    """The blocks that are selected from and the others, with their sizes, and how the selection is made."""
    selectable = [block for block in configuration.blocks_of(model) if block.trainable]
    names = {block.name for block in selectable}
    frozen = [block for block in find_blocks(model) if block.name not in names]
    started = policy.started(block_infos(selectable))
    per_step, remark = started.blocks_per_step, started.remark(steps)
    remarks = [f"note      {remark}"] if remark else []
    if configuration.model.use_peft and isinstance(policy, AdaGradSelect):
        remarks.append(f"note      {OVER_ADAPTERS}")
    settings = ", ".join(f"{name} {value}" for name, value in started.settings().items())
    lines = [f"blocks    {_describe_members(selectable)}; {per_step} trained per step"]
    if frozen:
        lines.append(f"frozen    {_describe_members(frozen)}")
    return [*lines, f"selection {settings}", *remarks]


def _describe_members(blocks: Sequence[Block]) -> str:
    sizes = [global_numel(block.trainable or block.parameters) for block in blocks]
    size = f"{sizes[0]:,} parameters each" if min(sizes) == max(sizes) else f"{sum(sizes):,} parameters"
    return f"{len(blocks)}: {block_ranges(block.name for block in blocks)}, {size}"


def _mean_length(trainer: Trainer) -> float:
    ids = trainer.train_dataset.select_columns("input_ids")[:ROWS_MEASURED]["input_ids"]
    return math.fsum(map(len, ids)) / len(ids)
