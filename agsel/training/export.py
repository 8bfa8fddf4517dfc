"""The trained model as an ordinary Hugging Face folder, from any ZeRO stage."""

import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, Trainer

from agsel.elements import element_layers, export_elements
from agsel.errors import RunError, UserError, one_line
from agsel.runs.checkpoints import fault_of_disk
from agsel.runs.folder import FILE_OF_ELEMENTS
from agsel.training.generation import mend
from agsel.training.output import on_first_rank
from agsel.zero.consensus import first_rank_does


def export_model(trainer: Trainer, folder: Path, group: Any = None, about: Mapping[str, Any] | None = None) -> None:
    """Write weights, configuration and tokenizer; a PEFT model's adapter alone. Every rank must call it.

    Of a model with trained elements these are written, too, beside the folder.

    Unlike `Trainer.save_model`, a head that is tied to the embedding is not written a second time: at stages 1 and 2
    accelerate clones every tensor, after which nobody can see that the two were one.

    Args:
        trainer: after training.
        folder: `from_pretrained` loads it; complete or absent.
        group: process group of all ranks, by default the run's own. The others wait in it for the first.
        about: what is written about trained elements.

    Raises:
        RunError: on every rank; the disk does not take it.
    """
    weights = trainer.accelerator.get_state_dict(trainer.model_wrapped)  # at stage 3 gathered by all ranks
    first_rank_does(partial(_write, trainer, weights, folder, about or {}), group)


def prepare_export(trainer: Trainer, group: Any = None) -> None:
    """Mend, or refuse before training, what could not be saved after it. Every rank must call it.

    Args:
        trainer: before training.
        group: as in `export_model`.

    Raises:
        UserError: on every rank; transformers refuses to save what it has loaded.
    """
    unset = mend(trainer.model.generation_config)
    if unset:
        listed = ", ".join(f"{name} {value}" for name, value in unset.items())
        on_first_rank(f"mended    generation settings of the model that have no effect are left out: {listed}")
    first_rank_does(partial(_rehearse, trainer), group)


def _rehearse(trainer: Trainer) -> None:
    """Write everything but the weights to where nobody looks."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    with tempfile.TemporaryDirectory() as folder:
        try:
            for part in (model.config, model.generation_config, trainer.processing_class):
                part.save_pretrained(folder)
        except (ValueError, TypeError) as error:
            raise UserError(
                f"the model (--model_name_or_path) could be trained, but not saved: {one_line(error)}; correct it"
            ) from error


def _write(trainer: Trainer, weights: dict[str, Any], folder: Path, about: Mapping[str, Any]) -> None:
    model = trainer.accelerator.unwrap_model(trainer.model)
    left_out = {f"{name.removesuffix('weight')}values" for name in element_layers(model)}  # the weights hold them
    if isinstance(model, PreTrainedModel):
        left_out |= model.all_tied_weights_keys.keys()
    with complete_or_absent(folder) as staged:
        if element_layers(model):
            export_elements(model, weights, folder.with_name(FILE_OF_ELEMENTS), about)
        model.save_pretrained(staged, state_dict={n: tensor for n, tensor in weights.items() if n not in left_out})
        if trainer.processing_class is not None:
            trainer.processing_class.save_pretrained(staged)


@contextmanager
def complete_or_absent(folder: Path) -> Iterator[Path]:
    """A folder to write a model to, which takes the place of `folder` at the end.

    Raises:
        RunError: the disk does not take it.
    """
    staged = folder.with_name(f"{folder.name}.incomplete")
    shutil.rmtree(staged, ignore_errors=True)
    try:
        yield staged
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
