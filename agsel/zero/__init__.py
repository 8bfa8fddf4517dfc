"""The DeepSpeed hook: everything that touches DeepSpeed's private parts is in this package."""

from agsel.zero.attach import attach
from agsel.zero.consensus import RanksDisagreeError
from agsel.zero.initialization import lean_initialization
from agsel.zero.selection import Selection, StepReport

__all__ = ["RanksDisagreeError", "Selection", "StepReport", "attach", "lean_initialization"]
