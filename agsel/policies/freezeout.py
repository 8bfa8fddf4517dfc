"""FreezeOut (Brock et al. 2017, arXiv 1706.04983): blocks are frozen one by one, from the lowest up."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from agsel.errors import UserError
from agsel.policies.policy import BlockInfo, Plan, Policy, setting


@dataclass(kw_only=True)
class FreezeOut(Policy):
    """Update all blocks at first, later the upper ones alone: the backward ends where the frozen ones begin.

    Of n blocks, the lowest round(n min(t^freeze_power, freeze_most)) are frozen after a share t of the steps, but never
    the highest: by default a third of them on average. In the paper t is linear or cubic in the depth, from a first t_0
    on, so that all come to be frozen, and each layer's learning rate falls to 0 by then; here all follow the run's
    schedule.

    Attributes:
        freeze_power: of the share of the steps; the higher it is, the later blocks are frozen.
        freeze_most: share of the blocks that are frozen in the end, in (0, 1].
        freeze_steps: in which the blocks are frozen. Left open, they become those of the run by `complete`, which
            `launch/train.py` calls.

    Raises:
        UserError: a setting is out of its range.
    """

    method = "freezeout"
    rule = "every layer at first, and as the run goes on the upper ones alone"
    spread_by = "raise --freeze_power or --freeze_steps, or lower --freeze_most"

    freeze_power: float = setting(
        1.5,
        help="After a share t of the steps the lowest t^power of the layers are frozen, up to --freeze_most. The "
        "larger, the more is trained.",
    )
    freeze_most: float = setting(
        0.6,
        help="Share of the layers, of those that take part, that are frozen in the end. With this and the power by "
        "default two thirds are trained, averaged over the steps.",
    )
    freeze_steps: int | None = setting(None, help="Optimizer steps of which t is a share. Default: those of the run.")

    def __post_init__(self) -> None:
        self._given = self.freeze_steps
        if not 0 < self.freeze_power < math.inf:
            raise UserError(f"freeze_power must be a number above 0, got {self.freeze_power} (--freeze_power)")
        if not 0 < self.freeze_most <= 1:
            raise UserError(f"freeze_most must be above 0 and at most 1, got {self.freeze_most} (--freeze_most)")
        if self.freeze_steps is not None and self.freeze_steps < 1:
            raise UserError(f"freeze_steps must be 1 or more, got {self.freeze_steps} (--freeze_steps)")

    def complete(self, epoch_steps: int, run_steps: int) -> None:
        """Freeze over the whole run, unless told otherwise."""
        if self._given is None:
            self.freeze_steps = run_steps

    def start(self, blocks: Sequence[BlockInfo]) -> None:
        """Begin a run over these blocks.

        Raises:
            UserError: the steps were left open.
        """
        if self.freeze_steps is None:
            raise UserError("freeze_steps is not given: set it, best to the optimizer steps of the run")
        super().start(blocks)

    def frozen(self, step: int) -> int:
        """How many of the lowest blocks are frozen after so many steps."""
        assert self.freeze_steps is not None, "start requires it"
        share = min(step / self.freeze_steps, 1.0)
        frozen = min(share**self.freeze_power, self.freeze_most)
        return min(int(self.number_of_blocks * frozen + 0.5), self.number_of_blocks - 1)

    def remark(self, run_steps: int) -> str | None:
        """How much is trained over the run, where there is a block that could be frozen."""
        if self.number_of_blocks == 1:
            return None
        frozen = [*map(self.frozen, range(run_steps))]
        if not frozen[-1]:
            return "no block is frozen in this run: raise --freeze_most, or lower --freeze_steps or --freeze_power"
        mean, last = self.number_of_blocks - sum(frozen) / run_steps, self.number_of_blocks - frozen[-1]
        return (
            f"{self.number_of_blocks} blocks at first, {mean:.1f} on average, {last} in the end "
            "(--freeze_power, --freeze_most, --freeze_steps)"
        )

    def make_plan(self) -> Plan:
        """The blocks that are not frozen."""
        return Plan.of(range(self.frozen(self.step), self.number_of_blocks))

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state_dict()`, by this run's settings at once."""
        super().load_state_dict(state)
        if self.is_planned:
            self._plan = self.make_plan()
