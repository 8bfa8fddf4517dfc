"""Whether what a run writes finds room on the disk, asked before it trains."""

from __future__ import annotations

import math
import shutil
from pathlib import Path

from transformers import Trainer
from transformers.trainer_utils import SaveStrategy
from trl import SFTConfig

from agsel.errors import UserError
from agsel.runs.checkpoints import checkpoints_in
from agsel.training.configuration import Configuration
from agsel.training.summary import Steps
from agsel.zero.parameters import global_numel

BYTES_OF_STATES = 12
"""Of each trained weight: fp32 master and two moments."""


def require_room_for_run(configuration: Configuration, trainer: Trainer, steps: Steps) -> None:
    """Refuse a run whose exported model and checkpoints do not fit on the disk.

    Raises:
        UserError: names what is needed, and what is free.
    """
    run_folder = Path(configuration.training.output_dir)
    checkpoints = checkpoints_at_once(configuration.training, steps)
    new = max(1, checkpoints - len(checkpoints_in(run_folder))) if checkpoints else 0
    weights = _bytes_of_weights(configuration.training, trainer)
    merged = _bytes_of_merged(configuration, trainer) if configuration.output.merge_adapter else 0
    copies = 1 if configuration.zero_stage == 3 else 2  # DeepSpeed keeps one beside the Trainer's
    require_room(run_folder, merged + weights + new * (copies * weights + _bytes_of_states(configuration, trainer)))


def require_room(run_folder: Path, needed_bytes: int) -> None:
    """Refuse a folder on a disk with less room than this.

    Raises:
        UserError: names what is needed, and what is free.
    """
    free = shutil.disk_usage(run_folder).free
    if free < needed_bytes:
        raise UserError(
            f"the run writes {needed_bytes / 1e9:.2f} GB to {run_folder}, {free / 1e9:.2f} GB are free there: choose "
            "another folder (--output_dir), or keep fewer checkpoints (--save_total_limit 1) or none (--save_strategy "
            "no)"
        )


def checkpoints_at_once(training: SFTConfig, steps: Steps) -> int:
    """How many checkpoints will be there at the same time, at least: a new one before the oldest is deleted."""
    if training.save_strategy == SaveStrategy.NO:
        return 0
    if not training.save_total_limit:
        return 1
    of_interval = training.save_steps if training.save_steps >= 1 else training.save_steps * steps.total
    between = {SaveStrategy.STEPS: of_interval, SaveStrategy.EPOCH: steps.per_epoch}
    saves = math.ceil(steps.total / between.get(training.save_strategy, steps.total))
    return min(training.save_total_limit + 1, saves)


def _bytes_of_weights(training: SFTConfig, trainer: Trainer) -> int:
    """Of the model as it is written, of which adapters are all where there are some."""
    is_adapted = hasattr(trainer.model, "peft_config")
    written = (weight for weight in trainer.model.parameters() if weight.requires_grad or not is_adapted)
    return global_numel(written) * (2 if training.bf16 or training.fp16 else 4)


def _bytes_of_merged(configuration: Configuration, trainer: Trainer) -> int:
    adapters = global_numel(weight for weight in trainer.model.parameters() if weight.requires_grad)
    itemsize = 4 if configuration.model.dtype == "float32" else 2
    return itemsize * (global_numel(trainer.model.parameters()) - adapters)


def _bytes_of_states(configuration: Configuration, trainer: Trainer) -> int:
    blocks = configuration.blocks_of(trainer.model)
    return BYTES_OF_STATES * sum(global_numel(block.trainable) for block in blocks)
