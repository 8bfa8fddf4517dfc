"""Training with Hugging Face Trainers: command-line settings, datasets, and the callback that attaches agsel."""

from agsel.training.arguments import DataArguments, SafetyArguments, SelectionArguments, build_policy
from agsel.training.callback import SelectionCallback, add_selection

__all__ = [
    "DataArguments",
    "SafetyArguments",
    "SelectionArguments",
    "SelectionCallback",
    "add_selection",
    "build_policy",
]
