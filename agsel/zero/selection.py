"""The selection of a run: plans each step, resolves it after the backward, and tells what happened."""

from __future__ import annotations

import logging
import math
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, Literal

import torch

from agsel.blocks import Block
from agsel.policies import Policy
from agsel.zero.consensus import checksum, global_squares
from agsel.zero.residency import Residency
from agsel.zero.sanity import SanityChecks

logger = logging.getLogger("agsel")

SHARE_IN_FORWARD = 0.8
"""Of the optimizer states that a step is known to need: how many have room on the device while activations are at their
peak. The others come in its backward, when activations are freed. With fewer, memory would only fall further below what
exploring steps need."""

LEAVING_IN_BACKWARD = 1 / 2
"""Of the optimizer states that a step sends to the host: how many wait for its backward, which takes half of the time
if some layers are frozen; if their room is given back, none."""


class Moment(IntEnum):
    """When in a step optimizer partitions start to move."""

    FORWARD = 1
    BACKWARD = 2
    LATE_BACKWARD = 3


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
        self._moved: Moment | None = None
        self._bytes_for_backward = 0.0
        self._layers_to_leave = 0
        self._last_explored: tuple[int, ...] = ()
        policy.start(len(blocks))

    @property
    def counts(self) -> dict[str, int]:
        """How often each block was updated."""
        return dict(zip(self.blocks, self.policy.counts, strict=True))

    @property
    def resident(self) -> tuple[str, ...]:
        """Names of the blocks whose optimizer partition is on the accelerator now."""
        return tuple(self.blocks[index] for index in self._resident_blocks())

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
        self.policy.load_state_dict(state["policy"])
        self.plan_step()

    def wanted_in_forward(self) -> tuple[int, ...]:
        """Indices of the blocks whose optimizer partitions have room on the device from the start of the forward.

        On an exploring plan none: the choice is not known yet, and the activations of all blocks need the memory.
        """
        plan = self.policy.plan()
        return () if plan.explore else early(plan.blocks, self._resident_blocks())

    def adopt_states(self) -> None:
        """Take over the optimizer states that DeepSpeed holds, at the start and after a checkpoint load."""
        if self.sanity is not None:
            self.sanity.forget()
        self.residency.adopt(self.wanted_in_forward())

    def plan_step(self) -> None:
        """Before the forward: freeze what the plan leaves out."""
        self._moved = None
        self._layers_to_leave = 0
        planned = set(self.policy.plan().blocks)
        for index, parameters in enumerate(self._parameters):
            for parameter in parameters:
                parameter.requires_grad_(index in planned)

    def move_states(self, moment: Moment) -> None:
        """Decide, once per step, where the plan wants optimizer partitions to be from this moment on.

        They travel while the step computes, a part with each layer that it enters or leaves.
        """
        if self._moved is None or moment > self._moved:
            self.residency.keep_only(self._wanted(moment))
            self._moved = moment
            if moment is Moment.FORWARD:
                most = LEAVING_IN_BACKWARD * self.residency.leaving_bytes
                self._bytes_for_backward = min(most, self.residency.exchanged_bytes)
            elif moment is Moment.BACKWARD and not self._layers_to_leave:
                self.residency.send()

    def enter_layer(self, hidden: torch.Tensor | None, remaining: int) -> None:
        """A forward reaches a decoder layer.

        Args:
            hidden: the layer's input, whose gradient tells that the backward is through with the layer.
            remaining: layers from here to the last, this one included.
        """
        self.move_states(Moment.FORWARD)
        if self._moved is not Moment.FORWARD:
            return  # another micro-batch, or a backward that computes the layer again
        self.residency.send((self.residency.leaving_bytes - self._bytes_for_backward) / remaining)
        if hidden is not None and hidden.requires_grad:
            self._layers_to_leave += 1
            hidden.register_hook(lambda _: self._leave_layer())

    def _leave_layer(self) -> None:
        """The backward is through with a layer."""
        self.residency.send(self.residency.leaving_bytes / max(1, self._layers_to_leave))
        self._layers_to_leave -= 1

    def _wanted(self, moment: Moment) -> Collection[int]:
        """On an exploring plan the last moment's guess is the last exploring step's choice; most will be right."""
        plan = self.policy.plan()
        if moment is Moment.LATE_BACKWARD:
            return self._last_explored if plan.explore else plan.blocks
        return self.wanted_in_forward()

    def _resident_blocks(self) -> list[int]:
        return [index for index in range(len(self.blocks)) if self.residency.is_resident(index)]

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
        self.residency.send()
        self.last = StepReport(
            step=self.policy.step,
            mode="explore" if plan.explore else "exploit",
            selected=tuple(self.blocks[index] for index in selected),
            norms=named,
            grad_norm=math.hypot(*(norms[index] for index in selected)),
        )
        return selected

    def make_all_trainable(self) -> None:
        """Undo the freezing."""
        for parameters in self._parameters:
            for parameter in parameters:
                parameter.requires_grad_(True)

    @contextmanager
    def everything_trainable(self) -> Iterator[None]:
        """For a while: DeepSpeed's checkpoints must not depend on the blocks selected just now."""
        self.make_all_trainable()
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


def early(blocks: Sequence[int], resident: Collection[int] = ()) -> tuple[int, ...]:
    """Of the blocks that a step will update, those that have room on the device from the start of its forward.

    The resident ones come first, so that as little as possible is moved.
    """
    resident_first = sorted(blocks, key=lambda block: block not in resident)
    return tuple(resident_first[: math.ceil(SHARE_IN_FORWARD * len(blocks))])
