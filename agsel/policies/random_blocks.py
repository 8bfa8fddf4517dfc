"""Uniform random selection, held for a number of steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from agsel.errors import UserError
from agsel.policies.policy import BlockInfo, FractionPolicy, Plan, blocks_of_fraction, setting


@dataclass(kw_only=True)
class RandomBlocks(FractionPolicy):
    """Update k blocks drawn uniformly without replacement, a new set every `every` steps.

    Raises:
        UserError: `every` is below 1.
    """

    method = "random"
    rule = "drawn uniformly"
    spread_by = "lower --select_every, or raise --select_fraction"

    every: int = setting(1, flag="select_every", help="Steps for which a set of blocks is kept.")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.every < 1:
            raise UserError(f"every must be 1 or more, got {self.every} (--select_every)")

    def start(self, blocks: Sequence[BlockInfo]) -> None:
        """Begin a run over these blocks, forgetting any earlier one."""
        super().start(blocks)
        self._current: list[int] = []

    @property
    def drawn_from(self) -> Sequence[int]:
        """Indices of the blocks that a set is drawn from."""
        return range(self.number_of_blocks)

    def make_plan(self) -> Plan:
        """The current set, or a new one."""
        if self.step % self.every == 0:
            count = blocks_of_fraction(self.fraction, len(self.drawn_from))
            drawn = self._generator.choice(self.drawn_from, size=count, replace=False)
            self._current = sorted(int(block) for block in drawn)
        return Plan.of(self._current)

    def state_dict(self) -> dict[str, Any]:
        """All that the next choice depends on, as plain Python values."""
        return super().state_dict() | {"current": list(self._current)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state_dict()`."""
        super().load_state_dict(state)
        self._current = list(state["current"])
