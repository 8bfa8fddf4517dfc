"""Which single weights a run trains: chosen at its start by its own rows and loss, kept in its folder, and reused."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from agsel.elements import ElementMask, choose_elements, use_elements
from agsel.errors import RunError, UserError
from agsel.monitor.progress import Progress
from agsel.runs.checkpoints import fault_of_disk
from agsel.training.configuration import Configuration
from agsel.training.identity import fingerprint_of_rows, fingerprint_of_weights
from agsel.training.output import on_first_rank
from agsel.training.row_trainer import RowTrainer
from agsel.zero.consensus import first_rank_does

FILE, BEFORE = "mask.safetensors", "mask.before.safetensors"
"""In the run folder: what is trained, and the choice in whose place it came."""


def train_elements(trainer: RowTrainer, configuration: Configuration, group: Any) -> None:
    """Choose elements, or take those of the run folder if they were chosen by the same, and train nothing else.

    Every rank must call it.

    Args:
        trainer: with tokens and model, before its engine is made.
        configuration: with `--elements`.
        group: process group of all ranks, on the host.

    Raises:
        UserError: as of `agsel.choose_elements`.
        RunError: likewise.
    """
    path = Path(configuration.training.output_dir, FILE)
    about = _describe(trainer, configuration)
    mask = first_rank_does(partial(_kept, path, about), group)
    if mask is None:
        mask = _chosen(trainer, configuration, about)
        said = first_rank_does(partial(_save, mask, path), group)
        if said is not None:
            on_first_rank(said)
    else:
        on_first_rank(f"elements  as chosen before: {path}")
    use_elements(trainer.model, mask)
    on_first_rank(f"elements  {mask.numel:,} in {len(mask.indices)} matrices, by {about['method']}")


def describe_elements(configuration: Configuration) -> dict[str, Any]:
    """What the file of the trained elements tells about them."""
    base, settings = configuration.model.model_name_or_path, configuration.elements
    return {
        "base_model": str(Path(base).resolve()) if Path(base).is_dir() else base,
        "revision": configuration.model.model_revision,
        "method": settings.elements,
        "density": settings.element_density,
    }


def _kept(path: Path, about: dict[str, Any]) -> ElementMask | None:
    """The mask of the run folder, if it was chosen by the same."""
    if not path.is_file():
        return None
    try:
        mask = ElementMask.load(path)
    except UserError:  # a file that was cut off
        return None
    return mask if dict(mask.about) == about else None


def _save(mask: ElementMask, path: Path) -> str | None:
    """In place of another choice, which is kept. Returns what is to be said."""
    before = path.with_name(BEFORE)
    is_other = path.is_file()
    try:
        if is_other:
            path.replace(before)
        mask.save(path)
    except Exception as error:
        reason = fault_of_disk(path.parent, error)
        if reason is None:
            raise
        raise RunError(f"the chosen elements could not be written to {path} ({reason}): make room") from error
    return f"elements  {path.name} was another choice, and is {before.name} now" if is_other else None


def _chosen(trainer: RowTrainer, configuration: Configuration, about: dict[str, Any]) -> ElementMask:
    training, settings = configuration.training, configuration.elements
    assert settings.elements is not None
    if configuration.zero_stage < 3:
        trainer.model.to(training.device)
    rows = _sample(len(trainer.train_dataset), settings.element_samples, training.seed)
    batches = _batches(trainer, rows, training.per_device_train_batch_size)
    own = batches[dist.get_rank() :: dist.get_world_size()]
    rounds = math.ceil(len(batches) / dist.get_world_size())
    with Progress("choosing elements", rounds, shown=dist.get_rank() == 0) as progress:

        def loss(numbers: Sequence[int]) -> Tensor:
            summed = trainer.summed_loss([trainer.train_dataset[number] for number in numbers])
            progress.advance(1)
            return summed

        mask = choose_elements(
            trainer.model,
            own,
            method=settings.elements,
            density=settings.element_density,
            loss=loss,
            blocks=configuration.blocks_of(trainer.model),
        )
    if training.device.type == "cuda":
        torch.cuda.empty_cache()
    return ElementMask(mask.indices, mask.shapes, about)


def _sample(rows: int, wanted: int, seed: int) -> list[int]:
    """Numbers of rows, without repetition."""
    return random.Random(seed).sample(range(rows), min(rows, wanted))


def _batches(trainer: RowTrainer, rows: Sequence[int], size: int) -> list[list[int]]:
    """Rows of similar lengths together, the longest first, in as many batches as there are ranks at least."""
    lengths = trainer.train_dataset.select(rows)["input_ids"]
    in_order = [row for _, row in sorted(zip(map(len, lengths), rows, strict=True), reverse=True)]
    size = max(1, min(size, len(rows) // dist.get_world_size()))
    return [in_order[begin : begin + size] for begin in range(0, len(in_order), size)]


def _describe(trainer: RowTrainer, configuration: Configuration) -> dict[str, Any]:
    """All that the choice depends on, but for the rounding of sums."""
    settings, training = configuration.elements, configuration.training
    return {
        "method": settings.elements,
        "density": settings.element_density,
        "samples": min(settings.element_samples, len(trainer.train_dataset)),
        "seed": training.seed,
        "loss": f"{training.loss_type}, label smoothing {training.label_smoothing_factor:g}",
        "rows": fingerprint_of_rows(trainer.train_dataset),
        "blocks": [block.name for block in configuration.blocks_of(trainer.model)],
        "weights": fingerprint_of_weights(trainer.model),
    }
