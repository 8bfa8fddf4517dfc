"""One training step on the meta device: which bytes live on a GPU when, without using memory or computing anything."""

from agsel.planning.rehearsal.rehearsal import CannotRehearseError, Peak, Rehearsal, running_model
from agsel.planning.rehearsal.trace import Trace
from agsel.planning.rehearsal.workload import Step, Workload, ZeroSettings

__all__ = ["CannotRehearseError", "Peak", "Rehearsal", "Step", "Trace", "Workload", "ZeroSettings", "running_model"]
