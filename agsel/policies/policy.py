"""What every selection policy shares: the plan of a step, the counts, the seeded generator, the saved state.

A policy is plain Python: it knows block indices and norms, nothing of torch.distributed or DeepSpeed. Every rank runs
the same policy on the same all-reduced norms, so every rank makes the same choice without a broadcast.
"""

from __future__ import annotations

import dataclasses
import logging
import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

logger = logging.getLogger("agsel")


def blocks_of_fraction(fraction: float, blocks: int) -> int:
    """k = max(1, int(fraction * blocks)): the paper truncates."""
    rounding_slack = 1e-9  # 0.29 * 100 is 28.999999999999996, and 29 is meant
    return max(1, int(fraction * blocks + rounding_slack))


def fraction_of_blocks(count: int, blocks: int) -> str:
    """A short decimal that `blocks_of_fraction` turns into this count again, which must be 1 or more."""
    digits = max(2, len(str(blocks - 1)))  # one digit less could stand for the next count
    return f"{math.ceil(10**digits * count / blocks) / 10**digits:.{digits}f}"


@dataclass(frozen=True)
class Plan:
    """What a step needs before its forward.

    Attributes:
        explore: the choice waits for the gradient norms of all blocks; otherwise `blocks` is already the choice.
        blocks: indices of the blocks that need a gradient, ascending.
    """

    explore: bool
    blocks: tuple[int, ...]


class Policy(ABC):
    """Decides which blocks each optimizer step updates. Subclasses are dataclasses of their settings.

    One step is `plan()` before the forward and `resolve(norms)` after the backward. `plan` may be called again before
    `resolve` and returns the same plan, so a step that is skipped (non-finite gradient) is simply tried again.
    """

    seed: int = 0

    def start(self, number_of_blocks: int) -> None:
        """Begin a run over this many blocks, forgetting any earlier one."""
        self.counts = [0] * number_of_blocks
        self.step = 0
        self._generator = np.random.default_rng(self.seed)
        self._plan: Plan | None = None

    @property
    def number_of_blocks(self) -> int:
        """How many blocks there are to select from."""
        return len(self.counts)

    def plan(self) -> Plan:
        """The plan of the current step."""
        if self._plan is None:
            self._plan = self._draw_plan()
        return self._plan

    def resolve(self, norms: Sequence[float]) -> tuple[int, ...]:
        """Commit the current step and return the indices of the blocks it updates, ascending.

        Args:
            norms: the global gradient norm of every block; read by exploring plans only.
        """
        plan = self.plan()
        selected = self._select_by_norm(norms) if plan.explore else plan.blocks
        for block in selected:
            self.counts[block] += 1
        self.step += 1
        self._plan = None
        return selected

    @abstractmethod
    def _draw_plan(self) -> Plan: ...

    def _select_by_norm(self, norms: Sequence[float]) -> tuple[int, ...]:
        raise NotImplementedError(f"{type(self).__name__} planned to explore but has no rule for it")

    def _explore_all(self) -> Plan:
        return Plan(explore=True, blocks=tuple(range(self.number_of_blocks)))

    def settings(self) -> dict[str, Any]:
        """Name and settings of the policy: what must be equal on all ranks."""
        return {"method": type(self).__name__} | dataclasses.asdict(self)  # type: ignore[call-overload]

    def state_dict(self) -> dict[str, Any]:
        """All that the next choice depends on, as plain Python values."""
        return {
            "settings": self.settings(),
            "counts": list(self.counts),
            "step": self.step,
            "generator": self._generator.bit_generator.state,
            "plan": dataclasses.asdict(self._plan) if self._plan else None,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state_dict()`. Settings that have changed since are named in a warning.

        Raises:
            ValueError: the state is of another method or another number of blocks.
        """
        self._compare_settings(state["settings"])
        if len(state["counts"]) != self.number_of_blocks:
            raise ValueError(
                f"the saved selection is over {len(state['counts'])} blocks, this run has {self.number_of_blocks}: "
                "use the model and the blocks setting (--select_blocks) of the saved run"
            )
        self.counts = list(state["counts"])
        self.step = state["step"]
        self._generator.bit_generator.state = state["generator"]
        plan = state["plan"]
        self._plan = Plan(plan["explore"], tuple(plan["blocks"])) if plan else None

    def _compare_settings(self, saved: dict[str, Any]) -> None:
        current = self.settings()
        if saved["method"] != current["method"]:
            raise ValueError(
                f"the saved selection is of {saved['method']}, this run's of {current['method']}: use the method "
                "(--method) of the saved run"
            )
        changed = [
            f"{name} {saved.get(name)} -> {value}" for name, value in current.items() if saved.get(name) != value
        ]
        if changed:
            logger.warning("the selection continues with changed settings: %s", ", ".join(changed))


@dataclass(kw_only=True)
class FractionPolicy(Policy):
    """A policy that updates the same number of blocks at every step.

    Attributes:
        fraction: share of the blocks to update, in (0, 1].
        seed: of the run's one generator.
    """

    fraction: float
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.fraction <= 1:
            raise ValueError(f"fraction must be in (0, 1], got {self.fraction} (--select_fraction)")
        if self.seed < 0:
            raise ValueError(f"seed must be 0 or more, got {self.seed} (--selection_seed)")

    @property
    def blocks_per_step(self) -> int:
        """k, the `blocks_of_fraction`."""
        return blocks_of_fraction(self.fraction, self.number_of_blocks)

    def _select_by_norm(self, norms: Sequence[float]) -> tuple[int, ...]:
        return self._largest(norms)

    def _largest(self, values: Sequence[float] | np.ndarray) -> tuple[int, ...]:
        """Indices of the `blocks_per_step` largest values, ascending; ties go to the earlier block."""
        order = sorted(range(len(values)), key=lambda block: (-values[block], block))
        return tuple(sorted(order[: self.blocks_per_step]))
