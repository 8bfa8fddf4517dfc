"""GRASS (arXiv 2604.07808): layers drawn by the size of their gradients, which steps that update nothing measure."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from agsel.errors import UserError
from agsel.policies.policy import BlockInfo, FractionPolicy, Plan, StepKind, Update, drawn, setting

AVERAGING = 0.1
"""Weight of a new measurement in the moving average, which the source does not give."""


@dataclass(kw_only=True)
class Grass(FractionPolicy):
    """Update gamma blocks drawn without replacement from p = softmax(m / τ), anew every `every` steps.

    m of a block is the root mean square of its gradient, ||g|| / sqrt(N) with N elements: at first its mean over
    `probe_steps` steps that update nothing, then a moving average over the steps that update it. After `refresh_every`
    steps all of it begins again. Where the source is silent, decided here: the weight of the average, `AVERAGING`; that
    new probes replace m; and the default τ.

    Attributes:
        fraction: gamma, as a share of the blocks.
        every: steps for which a set of blocks is kept.
        probe_steps: that update nothing.
        refresh_every: steps from one probe to the next, the probing steps included.
        temperature: τ; None is the standard deviation of m over the blocks, which has the scale of the gradients.

    Raises:
        UserError: a setting is out of its range.
    """

    method = "grass"
    rule = "drawn by the size of the gradients, which a few steps that update nothing measure"
    spread_by = "lower --select_every, or raise --select_fraction"

    every: int = setting(25, flag="select_every", help="Steps for which a set of blocks is kept.")
    probe_steps: int = setting(5, help="Steps that only measure gradients and update nothing, before blocks are drawn.")
    refresh_every: int = setting(500, help="Steps after which gradients are measured anew, the probing ones included.")
    temperature: float | None = setting(
        None,
        help="Blocks are drawn from the softmax of their root mean square gradients by this. Smaller draws the largest "
        "more often. Default: the standard deviation of these over the blocks.",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.every < 1:
            raise UserError(f"every must be 1 or more, got {self.every} (--select_every)")
        if self.probe_steps < 1:
            raise UserError(f"probe_steps must be 1 or more, got {self.probe_steps} (--probe_steps)")
        if self.refresh_every <= self.probe_steps:
            raise UserError(
                f"refresh_every must be more than the {self.probe_steps} probing steps, got {self.refresh_every} "
                "(--refresh_every, --probe_steps)"
            )
        if self.temperature is not None and not 0 < self.temperature < math.inf:
            raise UserError(f"temperature must be above 0, got {self.temperature} (--temperature)")

    def start(self, blocks: Sequence[BlockInfo]) -> None:
        """Begin a run over these blocks, forgetting any earlier one."""
        super().start(blocks)
        self._sizes = [0.0] * len(blocks)
        self._current: list[int] = []

    def remark(self, run_steps: int) -> str | None:
        """Whether nothing is trained."""
        if run_steps > self.probe_steps:
            return None
        return f"all {run_steps} steps only measure gradients, none trains: lower --probe_steps {self.probe_steps}"

    @property
    def kinds_of_steps(self) -> tuple[StepKind, ...]:
        """Those that probe, and those that train."""
        return ("probe", "exploit")

    def make_plan(self) -> Plan:
        """Measure all blocks; or update the current ones, or new ones."""
        step = self.step % self.refresh_every - self.probe_steps
        if step < 0:
            return Plan(frozenset(range(self.number_of_blocks)), Update(frozenset()))
        if step % self.every == 0 or not self._current:
            self._current = sorted(drawn(self._log_weights(), self.blocks_per_step, self._generator))
        return Plan.of(self._current)

    def choose(self, norms: Mapping[int, float]) -> Update:
        """What was planned; the norms are remembered."""
        probe = self.step % self.refresh_every
        weight = 1 / (probe + 1) if probe < self.probe_steps else AVERAGING
        for block, norm in norms.items():
            new = norm / math.sqrt(self.blocks[block].numel)
            self._sizes[block] += weight * (new - self._sizes[block])
        return super().choose(norms)

    def probabilities(self) -> list[float]:
        """p of each block."""
        weights = np.exp(self._log_weights())
        return (weights / weights.sum()).tolist()

    def _log_weights(self) -> np.ndarray:
        """Of the likeliest block 0: equal sizes have a standard deviation of rounding errors."""
        below = np.asarray(self._sizes) - max(self._sizes)
        temperature = self.temperature or below.std()
        return below / temperature if temperature > 0 else below

    def state_dict(self) -> dict[str, Any]:
        """All that the next choice depends on, as plain Python values."""
        return super().state_dict() | {"sizes": list(self._sizes), "current": list(self._current)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state_dict()`."""
        super().load_state_dict(state)
        self._sizes, self._current = list(state["sizes"]), list(state["current"])
