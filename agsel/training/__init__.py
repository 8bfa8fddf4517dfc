"""Training with Hugging Face Trainers: command-line settings, datasets, and the callback that attaches agsel."""

from agsel.training.arguments import DataArguments, SelectionArguments, build_policy
from agsel.training.callback import SelectionCallback, add_selection

__all__ = ["DataArguments", "SelectionArguments", "SelectionCallback", "add_selection", "build_policy"]
