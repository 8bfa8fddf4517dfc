"""What a run is like, for comparison with the run that resumes it; `agsel.runs.resume` says what may differ."""

from __future__ import annotations

import hashlib
import zlib
from typing import Any

from datasets import Dataset
from trl import SFTTrainer

from agsel.training.configuration import Configuration
from agsel.zero.parameters import global_numel, global_shape

ROWS_HASHED = 1000


def describe_for_resume(configuration: Configuration, trainer: SFTTrainer) -> dict[str, Any]:
    """What a resumed run is compared by: plain values."""
    training = configuration.training
    per_step = training.per_device_train_batch_size * training.gradient_accumulation_steps * training.world_size
    return {
        "model": _fingerprint_of_model(trainer),
        "stage": configuration.zero_stage,
        "dtype": configuration.model.dtype,
        "dataset": fingerprint_of_rows(trainer.train_dataset),
        "examples per step": per_step,
        "seed": training.seed if training.data_seed is None else training.data_seed,
        "order": str(training.train_sampling_strategy),
        "method": configuration.selection.method,
        "blocks": configuration.taking_part,
        "learning rate": training.learning_rate,
        "weight decay": training.weight_decay,
        "adam": f"betas {training.adam_beta1:g} {training.adam_beta2:g}, epsilon {training.adam_epsilon:g}",
        "ranks": training.world_size,
        "steps": training.max_steps if training.max_steps > 0 else f"those of {training.num_train_epochs:g} epochs",
        "schedule": f"{training.lr_scheduler_type.value} after {training.warmup_steps:g} of warmup",
        "clipping": training.max_grad_norm,
        "loss": _learnt_tokens(trainer),
        **_describe_choice(configuration.build_policy().settings()),
    }


def _describe_choice(settings: dict[str, Any]) -> dict[str, Any]:
    """What the policy has of these; of its other settings, `Policy.load_state_dict` says what changed."""
    known = {"fraction": "fraction", "selection seed": "seed"}
    return {name: settings[setting] for name, setting in known.items() if setting in settings}


def _learnt_tokens(trainer: SFTTrainer) -> str:
    only = {"on completions": trainer.completion_only_loss, "on assistant messages": trainer.args.assistant_only_loss}
    return " and ".join(name for name, chosen in only.items() if chosen) or "on all tokens"


def fingerprint_of_rows(rows: Dataset) -> str:
    """Of their number and the tokens of some, spread evenly: `ROWS_HASHED` to just under twice as many, or all."""
    step = max(1, len(rows) // ROWS_HASHED)
    digest = hashlib.sha256(str(len(rows)).encode())
    for row in rows.select(range(0, len(rows), step)).select_columns("input_ids"):
        digest.update(str(row["input_ids"]).encode())
    return f"{len(rows)} rows ({digest.hexdigest()[:8]})"


def _fingerprint_of_model(trainer: SFTTrainer) -> str:
    shapes = [(name, tuple(global_shape(parameter))) for name, parameter in trainer.model.named_parameters()]
    numel = global_numel(trainer.model.parameters())
    return f"{type(trainer.model).__name__} of {numel:,} parameters ({zlib.crc32(str(shapes).encode()):08x})"
