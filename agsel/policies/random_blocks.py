"""Uniform random selection, held for a number of steps: LISA's rule for its middle layers (arXiv 2403.17919)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from agsel.policies.policy import FractionPolicy, Plan


@dataclass(kw_only=True)
class RandomBlocks(FractionPolicy):
    """Update k blocks drawn uniformly without replacement, a new set every `every` steps.

    Raises:
        ValueError: `every` is below 1.
    """

    every: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.every < 1:
            raise ValueError(f"every must be 1 or more, got {self.every} (--select_every)")

    def start(self, number_of_blocks: int) -> None:
        """Begin a run over this many blocks, forgetting any earlier one."""
        super().start(number_of_blocks)
        self._current: tuple[int, ...] = ()

    def _draw_plan(self) -> Plan:
        if self.step % self.every == 0:
            drawn = self._generator.choice(self.number_of_blocks, size=self.blocks_per_step, replace=False)
            self._current = tuple(sorted(int(block) for block in drawn))
        return Plan(explore=False, blocks=self._current)

    def state_dict(self) -> dict[str, Any]:
        """All that the next choice depends on, as plain Python values."""
        return super().state_dict() | {"current": list(self._current)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state_dict()`."""
        super().load_state_dict(state)
        self._current = tuple(state["current"])
