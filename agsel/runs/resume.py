"""Resuming: which checkpoint, and what became of settings that differ from those of the run that saved it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from agsel.errors import UserError
from agsel.runs import checkpoints

REFUSED = {
    "base weights": (
        "--model_name_or_path, --model_revision",
        "the saved adapters belong to them, which are no part of a checkpoint",
    ),
    "model": ("--model_name_or_path, --lora_target_modules", "the saved optimizer states belong to its weights"),
    "stage": ("--deepspeed", "each ZeRO stage saves the optimizer states in its own form"),
    "dtype": ("--bf16, --fp16, --dtype", "the weights were rounded to it"),
    "data": (
        "--dataset_name, --dataset_train_split, --prompt_field, --prompt_template, --completion_field, "
        "--completion_template, --eval_split_fraction",
        "the run goes on with the rows that it has not seen yet, so they must be the same in the same order",
    ),
    "dataset": (
        "--max_length, --chat_template_path and the tokenizer",
        "the run goes on with the rows that it has not seen yet, so they must give the same tokens in the same order",
    ),
    "examples per step": (
        "--per_device_train_batch_size x --gradient_accumulation_steps x ranks",
        "it tells how many rows the run has seen",
    ),
    "seed": ("--seed, --data_seed", "the order of the rows follows from it"),
    "order": ("--train_sampling_strategy", "the rows that the run has not seen yet follow from it"),
    "method": ("--method", "the saved state of the selection is of that method"),
    "blocks": ("--select_blocks, --select_from", "the saved state of the selection is over them"),
    "elements": (
        "--elements, --element_density, --element_samples",
        "the saved optimizer states belong to the elements that were chosen",
    ),
    "chosen elements": ("mask.safetensors of the run folder", "the saved optimizer states belong to them"),
    "adapters": (
        "--use_peft, --use_dora, --lora_r, --lora_alpha, --use_rslora",
        "the saved adapters were trained with that",
    ),
    "learning rate": ("--learning_rate", "the saved schedule goes on"),
    "weight decay": ("--weight_decay", "the saved optimizer goes on"),
    "adam": ("--adam_beta1, --adam_beta2, --adam_epsilon", "the saved optimizer goes on"),
}
"""Settings that a resumed run must share with the run that saved: the flags, and why."""
NEWEST = ("auto", "true")
"""Words for the newest checkpoint of the run folder."""
TAKES_EFFECT = "takes effect from here on"
EFFECTS = {
    "ranks": "the checkpoint is converted",
    "selection seed": "has no effect, the saved generator goes on (--selection_seed)",
    "fraction": "takes effect when blocks are chosen next; those of the next step have been (--select_fraction)",
    "steps": f"{TAKES_EFFECT}, and the learning rate falls towards the new end (--max_steps, --num_train_epochs)",
    "schedule": f"{TAKES_EFFECT} (--lr_scheduler_type, --lr_scheduler_kwargs, --warmup_steps)",
    "clipping": f"{TAKES_EFFECT} (--max_grad_norm)",
    "loss": f"{TAKES_EFFECT} (--completion_only_loss, --assistant_only_loss)",
    "loss function": f"{TAKES_EFFECT} (--loss_type, --label_smoothing_factor)",
    "noise": f"{TAKES_EFFECT} (--neftune_noise_alpha, --lora_dropout)",
    "folded adapters": f"{TAKES_EFFECT} (--fold_adapters)",
    "early choice": f"{TAKES_EFFECT} (--choose_early)",
}
"""What becomes of the others when they change."""


def find_checkpoint(wanted: str | None, run_folder: Path, group: Any) -> Path | None:
    """The checkpoint to resume from, verified to the last byte. Every rank must call it.

    Args:
        wanted: None for a fresh start; `auto` for the newest complete checkpoint of the run folder if there is one;
            `true` for the same if there must be one; else a checkpoint folder.
        run_folder: of this run.
        group: process group of all ranks, on the host.

    Raises:
        UserError: on every rank: the named checkpoint is incomplete or damaged, or there must be one and is none.
    """
    if wanted is None:
        return None
    if wanted not in NEWEST:
        reason = checkpoints.damage(Path(wanted), group)
        if reason is not None:
            if checkpoints.checkpoints_in(Path(wanted)):
                raise UserError(
                    f"{wanted} (--resume_from_checkpoint) is a run folder: name one of its checkpoints, or give it as "
                    "--output_dir with --resume_from_checkpoint auto"
                )
            raise UserError(
                f"cannot resume from {wanted} (--resume_from_checkpoint): {reason}; use another checkpoint, or auto "
                "for the newest complete one"
            )
        return Path(wanted)
    newest = checkpoints.newest_complete(run_folder, group)
    if newest is None and wanted == "true":
        raise UserError(f"{run_folder} holds no complete checkpoint to resume from (--resume_from_checkpoint)")
    return newest


def require_steps_left(step: int, total: int) -> None:
    """Refuse to shorten a run to fewer steps than it has done; one that has done all of them may export again.

    Args:
        step: of the checkpoint.
        total: at which the run ends now.

    Raises:
        UserError: it would have ended before.
    """
    if step > total:
        raise UserError(
            f"cannot resume (--resume_from_checkpoint): the checkpoint is of step {step}, and the run ends at step "
            f"{total}: raise --max_steps or --num_train_epochs, or resume from an earlier checkpoint"
        )


def compare(saved: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """One sentence for each setting that changed and takes effect, or is kept.

    Raises:
        UserError: changed settings cannot take effect; the message names all of them, their flags and the remedy.
    """
    changed = {
        name: f"{name} was {saved[name]} and is {value} now"
        for name, value in now.items()
        if name in saved and saved[name] != value
    }
    refused = [
        f"{change} ({flags}; {why})"
        for name, (flags, why) in REFUSED.items()
        if (change := changed.get(name)) is not None
    ]
    if refused:
        anew = "start a new run (another --output_dir)"
        if saved.get("adapters", "none") == "none":
            anew = (
                "start a new run from the checkpoint's weights (give the checkpoint as --model_name_or_path, and "
                "another --output_dir)"
            )
        raise UserError(f"cannot resume (--resume_from_checkpoint): {', '.join(refused)}: set it back, or {anew}")
    return [f"{change}: {EFFECTS[name]}" for name, change in changed.items()]
