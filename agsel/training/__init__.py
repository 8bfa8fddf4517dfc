"""Training with Hugging Face Trainers: command-line settings, datasets, and agsel on the Trainer's engine."""

from agsel.training.attachment import add_selection, train_blocks
from agsel.training.callback import SelectionCallback

__all__ = ["SelectionCallback", "add_selection", "train_blocks"]
