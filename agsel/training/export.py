"""The trained model as an ordinary Hugging Face folder, from any ZeRO stage."""

import shutil
from functools import partial
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, Trainer

from agsel.errors import RunError
from agsel.runs.checkpoints import fault_of_disk
from agsel.zero.consensus import first_rank_does


def export_model(trainer: Trainer, folder: Path, group: Any = None) -> None:
    """Write weights, configuration and tokenizer; a PEFT model's adapter alone. Every rank must call it.

    Unlike `Trainer.save_model`, a head that is tied to the embedding is not written a second time: at stages 1 and 2
    accelerate clones every tensor, after which nobody can see that the two were one.

    Args:
        trainer: after training.
        folder: `from_pretrained` loads it; complete or absent.
        group: process group of all ranks, by default the run's own. The others wait in it for the first.

    Raises:
        RunError: on every rank; the disk does not take it.
    """
    weights = trainer.accelerator.get_state_dict(trainer.model_wrapped)  # at stage 3 gathered by all ranks
    first_rank_does(partial(_write, trainer, weights, folder), group)


def _write(trainer: Trainer, weights: dict[str, Any], folder: Path) -> None:
    model = trainer.accelerator.unwrap_model(trainer.model)
    if isinstance(model, PreTrainedModel):
        weights = {name: tensor for name, tensor in weights.items() if name not in model.all_tied_weights_keys}
    staged = folder.with_name(f"{folder.name}.incomplete")
    shutil.rmtree(staged, ignore_errors=True)
    try:
        model.save_pretrained(staged, state_dict=weights)
        if trainer.processing_class is not None:
            trainer.processing_class.save_pretrained(staged)
    except Exception as error:
        reason = fault_of_disk(folder.parent, error)
        shutil.rmtree(staged, ignore_errors=True)
        if reason is None:
            raise
        raise RunError(
            f"the trained model could not be written to {folder} ({reason}): make room, then go on from the newest "
            "checkpoint (--resume_from_checkpoint auto)"
        ) from error
    shutil.rmtree(folder, ignore_errors=True)
    staged.rename(folder)
