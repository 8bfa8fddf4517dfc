"""What a run shows of itself: TensorBoard scalars of the selection, and the status line."""

from agsel.monitor.status import block_ranges, has_results_of_tasks, status_line
from agsel.monitor.tensorboard import normalised_entropy, selection_scalars

__all__ = ["block_ranges", "has_results_of_tasks", "normalised_entropy", "selection_scalars", "status_line"]
