"""The selection of a run: plans each step, resolves it after the backward, and tells what happened."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch

from agsel.blocks import Block
from agsel.policies import Policy
from agsel.zero.consensus import checksum, global_squares
from agsel.zero.residency import Residency
from agsel.zero.sanity import SanityChecks

logger = logging.getLogger("agsel")

SHARE_IN_FORWARD = 0.8
"""Of the optimizer states that a step is known to need. The others come in its backward, when activations are freed.
With fewer in the forward, memory would only fall further below what exploring steps need."""


class TooManySkippedStepsError(RuntimeError):
    """The gradients stayed non-finite for `max_skipped_steps` steps in a row."""


@dataclass(frozen=True)
class StepReport:
    """What one optimizer step did.

    Attributes:
        step: number of optimizer steps applied so far, this one included.
        mode: `"explore"` (chosen after the backward), `"exploit"` (planned before it), or `"skipped"` (non-finite).
        selected: names of the updated blocks.
        norms: global gradient norm of each block that had a gradient.
        grad_norm: norm over the updated blocks: what clipping compares with its limit.
    """

    step: int
    mode: Literal["explore", "exploit", "skipped"]
    selected: tuple[str, ...]
    norms: dict[str, float]
    grad_norm: float


class Selection:
    """The selection state of a run; equal on every rank. Made by `agsel.attach`.

    Attributes:
        blocks: names of the blocks that take part, in forward order.
        policy: who is updated next.
        last: report of the last optimizer step, None before the first.
        sanity: the checks that every step makes of itself, None without.
    """

    def __init__(
        self,
        blocks: Sequence[Block],
        policy: Policy,
        residency: Residency,
        group: Any,
        max_skipped_steps: int,
        sanity: SanityChecks | None = None,
    ) -> None:
        self.blocks = tuple(block.name for block in blocks)
        self.policy = policy
        self.last: StepReport | None = None
        self.sanity = sanity
        self.residency = residency
        self._parameters = [block.trainable for block in blocks]
        self._group = group
        self._max_skipped_steps = max_skipped_steps
        self._skipped_in_a_row = 0
        self._has_moved = self._has_completed = False
        self._last_explored: tuple[int, ...] = ()
        policy.start(len(blocks))

    @property
    def counts(self) -> dict[str, int]:
        """How often each block was updated."""
        return dict(zip(self.blocks, self.policy.counts, strict=True))

    @property
    def resident(self) -> tuple[str, ...]:
        """Names of the blocks whose optimizer partition is on the accelerator now."""
        return tuple(name for index, name in enumerate(self.blocks) if self.residency.is_resident(index))

    def state_dict(self) -> dict[str, Any]:
        """All that the coming selections depend on, as plain Python values; `engine.save_checkpoint` carries it."""
        return {"blocks": list(self.blocks), "policy": self.policy.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state_dict()`, and plan the next step from it.

        Raises:
            ValueError: the state is of a run over other blocks.
        """
        if tuple(state["blocks"]) != self.blocks:
            raise ValueError(
                f"the saved selection is over {len(state['blocks'])} blocks ({state['blocks'][0]} ...), this run's "
                f"over {len(self.blocks)} ({self.blocks[0]} ...): use the model and blocks setting of the saved run"
            )
        if self.sanity is not None:
            self.sanity.forget()
        self.policy.load_state_dict(state["policy"])
        self.plan_step()

    def wanted_in_forward(self) -> tuple[int, ...]:
        """Indices of the blocks whose optimizer partitions should be on the device in the next forward.

        On an exploring plan none: the choice is not known yet, and the activations of all blocks need the memory.
        """
        plan = self.policy.plan()
        return () if plan.explore else early(plan.blocks)

    def plan_step(self) -> None:
        """Before the forward: freeze what the plan leaves out."""
        self._has_moved = self._has_completed = False
        planned = set(self.policy.plan().blocks)
        for index, parameters in enumerate(self._parameters):
            for parameter in parameters:
                parameter.requires_grad_(index in planned)

    def move_states(self) -> None:
        """In the forward: start moving optimizer partitions to where the plan wants them, once per step."""
        if not self._has_moved:
            self.residency.keep_only(self.wanted_in_forward())
            self._has_moved = True

    def complete_states(self) -> None:
        """In the backward: start fetching the partitions that are still missing, once per step.

        On an exploring plan those that the last exploring step chose; most will be right.
        """
        if not self._has_completed:
            plan = self.policy.plan()
            self.residency.keep_only(self._last_explored if plan.explore else plan.blocks)
            self._has_completed = True

    def resolve(self, local_squares: torch.Tensor, loss_scale: float) -> tuple[int, ...]:
        """After the backward: fix the blocks to update, on all ranks alike. Empty if the step must be skipped.

        Args:
            local_squares: fp64 [blocks], sums of squares of this rank's (loss-scaled) gradient partitions.
            loss_scale: what the gradients were multiplied by.

        Raises:
            RanksDisagreeError: the ranks hold different selection states.
            RuntimeError: too many steps in a row were skipped, or a planned block received no gradient.
        """
        plan = self.policy.plan()
        number = self.policy.step + 1
        squares = global_squares(local_squares, checksum(self.state_dict()), self._group, number)
        norms = [math.sqrt(square) / loss_scale for square in squares]
        named = {self.blocks[index]: norms[index] for index in plan.blocks}
        if not all(math.isfinite(norm) for norm in norms):
            self._skip(named)
            return ()
        self._require_gradients(named)
        self._skipped_in_a_row = 0
        selected = self.policy.resolve(norms)
        if plan.explore:
            self._last_explored = selected
        self.residency.keep_only(selected)
        self.last = StepReport(
            step=self.policy.step,
            mode="explore" if plan.explore else "exploit",
            selected=tuple(self.blocks[index] for index in selected),
            norms=named,
            grad_norm=math.hypot(*(norms[index] for index in selected)),
        )
        return selected

    @contextmanager
    def everything_trainable(self) -> Iterator[None]:
        """Undo the freezing for a while: DeepSpeed's checkpoints must not depend on the blocks selected just now."""
        for parameters in self._parameters:
            for parameter in parameters:
                parameter.requires_grad_(True)
        try:
            yield
        finally:
            self.plan_step()

    def _skip(self, norms: dict[str, float]) -> None:
        self._skipped_in_a_row += 1
        self.last = StepReport(self.policy.step, "skipped", (), norms, math.inf)
        culprits = [name for name, norm in norms.items() if not math.isfinite(norm)]
        logger.warning("step skipped on all ranks: non-finite gradient in %s", ", ".join(culprits))
        if self._skipped_in_a_row >= self._max_skipped_steps:
            raise TooManySkippedStepsError(
                f"{self._skipped_in_a_row} steps in a row had a non-finite gradient (max_skipped_steps): "
                "lower the learning rate, look at the data, or use bf16 instead of fp16"
            )

    def _require_gradients(self, norms: dict[str, float]) -> None:
        """A block that should train but is cut off from the loss would silently stay as it is."""
        silent = [name for name, norm in norms.items() if norm == 0]
        if silent and len(silent) < len(norms):
            raise RuntimeError(
                f"no gradient reached {', '.join(silent)}: with gradient checkpointing set use_reentrant=False "
                "(gradient_checkpointing_kwargs)"
            )


def early(blocks: Sequence[int]) -> tuple[int, ...]:
    """Of the blocks that a step will update, those whose optimizer partitions it fetches in its forward."""
    return tuple(blocks[: math.ceil(SHARE_IN_FORWARD * len(blocks))])
