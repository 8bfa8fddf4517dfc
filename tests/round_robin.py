"""A selection rule that nobody in agsel knows: the blocks take turns."""

from dataclasses import dataclass

import agsel


@dataclass(kw_only=True)
class RoundRobin(agsel.FractionPolicy):
    """Update the next k blocks, and start again after the last.

    Attributes:
        stride: steps for which a turn lasts.
    """

    stride: int = 1

    def make_plan(self) -> agsel.Plan:
        """k blocks, from where the turn before ended."""
        first = self.step // self.stride * self.blocks_per_step
        return agsel.Plan.of((first + turn) % self.number_of_blocks for turn in range(self.blocks_per_step))


class Lazy(agsel.TopK):
    """Without a line of its own."""
