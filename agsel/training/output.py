"""Where the lines and curves of a run go."""

import sys
from pathlib import Path
from typing import Any

import torch.distributed as dist
from transformers import PrinterCallback, ProgressCallback, Trainer
from transformers.integrations import TensorBoardCallback


def on_first_rank(text: str) -> None:
    """Print from one rank only, in one piece: others may log at the same time."""
    if dist.get_rank() == 0:
        sys.stdout.write(f"{text}\n")
        sys.stdout.flush()


class ProgressBar(ProgressCallback):
    """The Trainer's progress bar without its lines of numbers: agsel's status line says that in words."""

    def on_log(self, *arguments: Any, **options: Any) -> None:
        """Write nothing."""


def direct_output(trainer: Trainer) -> None:
    """Status line, progress bar on a terminal, TensorBoard in the run folder unless TENSORBOARD_LOGGING_DIR is set."""
    trainer.remove_callback(PrinterCallback if trainer.args.disable_tqdm else ProgressCallback)
    if sys.stderr.isatty() and not trainer.args.disable_tqdm:
        trainer.add_callback(ProgressBar)
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, TensorBoardCallback) and callback.logging_dir is None:
            callback.logging_dir = str(Path(trainer.args.output_dir, "tensorboard"))
