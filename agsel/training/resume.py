"""Resuming: which checkpoint, and what became of settings that differ from those of the run that saved it."""

from __future__ import annotations

import hashlib
import zlib
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import Trainer

from agsel.training import checkpoints
from agsel.training.configuration import Configuration

ROWS_HASHED = 1000
REFUSED = {
    "model": "load the model that the run was started with (--model_name_or_path)",
    "stage": "use the DeepSpeed configuration of that stage (--deepspeed)",
    "dtype": "train in the saved precision (--bf16, --fp16)",
    "dataset": "a run cannot go on with other rows in another order; use the same data (--dataset_name), or start a "
    "new run from the checkpoint's weights (--model_name_or_path)",
    "examples per step": "keep batch size x accumulation x ranks (--per_device_train_batch_size, "
    "--gradient_accumulation_steps)",
    "seed": "the order of the rows follows from it (--seed, --data_seed)",
    "method": "start a new run for another method (--method)",
    "blocks": "choose among the same blocks (--select_blocks)",
    "learning rate": "the saved schedule goes on (--learning_rate); start a new run from the checkpoint's weights "
    "(--model_name_or_path) for another one",
}
"""Settings that a resumed run must share with the run that saved, and the remedy."""


def find_checkpoint(wanted: str | None, run_folder: Path, group: Any) -> Path | None:
    """The checkpoint to resume from, verified to the last byte. Every rank must call it.

    Args:
        wanted: None for a fresh start; `auto` for the newest complete checkpoint of the run folder if there is one;
            `true` for the same if there must be one; else a checkpoint folder.
        run_folder: of this run.
        group: process group of all ranks, on the host.

    Raises:
        ValueError: on every rank: the named checkpoint is incomplete or damaged, or there must be one and is none.
    """
    if wanted is None:
        return None
    if wanted not in ("auto", "true"):
        reason = checkpoints.damage(Path(wanted), group)
        if reason is not None:
            raise ValueError(
                f"cannot resume from {wanted} (--resume_from_checkpoint): {reason}; use another checkpoint, or auto "
                "for the newest complete one"
            )
        return Path(wanted)
    newest = checkpoints.newest_complete(run_folder, group)
    if newest is None and wanted == "true":
        raise ValueError(f"{run_folder} holds no complete checkpoint to resume from (--resume_from_checkpoint)")
    return newest


def describe_for_resume(configuration: Configuration, trainer: Trainer) -> dict[str, Any]:
    """What a resumed run is compared by: plain values."""
    training, selection = configuration.training, configuration.selection
    per_step = training.per_device_train_batch_size * training.gradient_accumulation_steps * training.world_size
    return {
        "model": _fingerprint_of_model(trainer),
        "stage": configuration.zero_stage,
        "dtype": configuration.model.dtype,
        "dataset": fingerprint_of_rows(trainer.train_dataset),
        "examples per step": per_step,
        "seed": training.seed if training.data_seed is None else training.data_seed,
        "method": selection.method,
        "blocks": selection.taking_part,
        "learning rate": training.learning_rate,
        "ranks": training.world_size,
        "fraction": selection.select_fraction,
        "steps": training.max_steps if training.max_steps > 0 else f"{training.num_train_epochs} epochs",
        "selection seed": selection.selection_seed if selection.selection_seed is not None else training.seed,
    }


def compare(saved: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """One sentence for each setting that changed and takes effect, or is kept.

    Raises:
        ValueError: a changed setting cannot take effect; the message names it and the remedy.
    """
    changed = {name: (saved[name], value) for name, value in now.items() if name in saved and saved[name] != value}
    for name, (before, after) in changed.items():
        if name in REFUSED:
            raise ValueError(f"the checkpoint's run had {name} {before}, this one has {after}: {REFUSED[name]}")
    effects = {"ranks": "the checkpoint is converted", "selection seed": "has no effect, the saved generator goes on"}
    return [
        f"{name} was {before}, is {after} now: {effects.get(name, 'takes effect from here on')}"
        for name, (before, after) in changed.items()
    ]


def fingerprint_of_rows(rows: Dataset) -> str:
    """Of their number and of the tokens of up to `ROWS_HASHED` of them, spread evenly."""
    step = max(1, len(rows) // ROWS_HASHED)
    digest = hashlib.sha256(str(len(rows)).encode())
    for row in rows.select(range(0, len(rows), step)).select_columns("input_ids"):
        digest.update(str(row["input_ids"]).encode())
    return digest.hexdigest()[:16]


def _fingerprint_of_model(trainer: Trainer) -> str:
    parameters = trainer.model.named_parameters()
    shapes = [(name, tuple(getattr(parameter, "ds_shape", parameter.shape))) for name, parameter in parameters]
    return f"{type(trainer.model).__name__} {zlib.crc32(str(shapes).encode()):08x}"
