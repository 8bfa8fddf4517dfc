"""FreezeOut (Brock et al. 2017, arXiv 1706.04983): blocks are frozen one by one, from the lowest up."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from agsel.errors import UserError
from agsel.policies.policy import BlockInfo, Plan, Policy, setting


@dataclass(kw_only=True)
class FreezeOut(Policy):
    """Update all blocks at first, later the upper ones alone: the backward ends where the frozen ones begin.

    Of n blocks, the lowest round(n t^power) are frozen after a share t of the steps; the highest never is. So
    1 / (power + 1) of the blocks are frozen on average. In the paper t is linear or cubic in the block's depth, from a
    first t_0 on, and each layer's learning rate falls to 0 by then; here all follow the run's schedule.

    Attributes:
        power: of the share of the steps; the higher it is, the later blocks are frozen.
        steps: in which the blocks are frozen. Left open, they become those of the run by `complete`, which
            `launch/train.py` calls.

    Raises:
        UserError: a setting is out of its range.
    """

    method = "freezeout"
    rule = "every layer at first, and as the run goes on the upper ones alone"
    spread_by = "raise --freeze_power"

    power: float = setting(
        2.0,
        flag="freeze_power",
        help="After a share t of the steps the lowest t^power of the layers are frozen. The larger, the more is "
        "trained; 2 trains two thirds on average.",
    )
    steps: int | None = setting(
        None,
        flag="freeze_steps",
        help="Optimizer steps until all layers but one are frozen. Default: those of the run.",
    )

    def __post_init__(self) -> None:
        if not 0 < self.power < math.inf:
            raise UserError(f"power must be above 0, got {self.power} (--freeze_power)")
        if self.steps is not None and self.steps < 1:
            raise UserError(f"steps must be 1 or more, got {self.steps} (--freeze_steps)")

    def complete(self, epoch_steps: int, run_steps: int) -> None:
        """Freeze over the whole run, unless told otherwise."""
        if self.steps is None:
            self.steps = run_steps

    def start(self, blocks: Sequence[BlockInfo]) -> None:
        """Begin a run over these blocks.

        Raises:
            UserError: the steps were left open.
        """
        if self.steps is None:
            raise UserError("steps is not given: set it, best to the optimizer steps of the run")
        super().start(blocks)

    def frozen(self, step: int) -> int:
        """How many of the lowest blocks are frozen after so many steps."""
        assert self.steps is not None, "start requires it"
        share = min(step / self.steps, 1.0)
        return min(int(self.number_of_blocks * share**self.power + 0.5), self.number_of_blocks - 1)

    def remark(self, run_steps: int) -> str | None:
        """How much is trained over the run."""
        trained = self.number_of_blocks - sum(map(self.frozen, range(run_steps))) / run_steps
        return f"{trained:.1f} of {self.number_of_blocks} blocks are trained on average (--freeze_power)"

    def make_plan(self) -> Plan:
        """The blocks that are not frozen."""
        return Plan.of(range(self.frozen(self.step), self.number_of_blocks))
