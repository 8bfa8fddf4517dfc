"""Where the lines and curves of a run go."""

import sys
from typing import Any

import torch.distributed as dist
from transformers import PrinterCallback, ProgressCallback, Trainer
from transformers.integrations import TensorBoardCallback

from agsel.training.callback import SelectionCallback
from agsel.training.curves import Curves


def on_first_rank(text: str) -> None:
    """Print from one rank only, in one piece: others may log at the same time."""
    if dist.get_rank() == 0:
        sys.stdout.write(f"{text}\n")
        sys.stdout.flush()


class ProgressBar(ProgressCallback):
    """The Trainer's progress bar without its lines of numbers: agsel's status line says that in words."""

    def on_log(self, *arguments: Any, **options: Any) -> None:
        """Write nothing."""


def direct_output(trainer: Trainer, callback: SelectionCallback) -> None:
    """Numbers go through agsel's callback first; the Trainer's bar stays, on a terminal, but not its lines of numbers.

    Its TensorBoard callback, if it has one, becomes agsel's, which writes to the same place; other classes stay.
    """
    trainer.remove_callback(PrinterCallback)
    if trainer.pop_callback(ProgressCallback) is not None and sys.stderr.isatty():
        trainer.add_callback(ProgressBar)
    theirs = next((item for item in trainer.callback_handler.callbacks if type(item) is TensorBoardCallback), None)
    if theirs is not None:
        trainer.remove_callback(theirs)
        curves = Curves(lambda: callback.history)
        curves.logging_dir, curves.tb_writer = theirs.logging_dir, theirs.tb_writer
        trainer.add_callback(curves)
    trainer.callback_handler.callbacks.insert(0, callback)


def curves_of(trainer: Trainer) -> Curves | None:
    """What the Trainer writes for TensorBoard, if it does."""
    return next((item for item in trainer.callback_handler.callbacks if isinstance(item, Curves)), None)
