"""What a run shows of itself: the status line, numbers of the selection, its history, pictures of it."""

from agsel.monitor.history import METRICS, SELECTION, STARTS, SelectionHistory, StepLines
from agsel.monitor.status import block_ranges, count_levels, duration, has_results_of_tasks, status_line
from agsel.monitor.tensorboard import LAYOUT, NORM, normalised_entropy, selection_scalars, tag_of

__all__ = [
    "LAYOUT",
    "METRICS",
    "NORM",
    "SELECTION",
    "STARTS",
    "SelectionHistory",
    "StepLines",
    "block_ranges",
    "count_levels",
    "duration",
    "has_results_of_tasks",
    "normalised_entropy",
    "selection_scalars",
    "status_line",
    "tag_of",
]
