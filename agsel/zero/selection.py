"""The selection of a run: plans each step, commits it after the backward, and tells what happened."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch

from agsel.blocks import EMBED, Block
from agsel.errors import RunError, UserError
from agsel.policies import Plan, Policy, Probe, StepKind, Update
from agsel.zero.consensus import checksum, global_squares
from agsel.zero.residency import Residency
from agsel.zero.sanity import SanityChecks
from agsel.zero.timetable import Timetable

logger = logging.getLogger("agsel")


class TooManySkippedStepsError(RunError):
    """The gradients stayed non-finite for `max_skipped_steps` steps in a row."""


@dataclass(frozen=True)
class StepReport:
    """What one optimizer step did.

    Attributes:
        step: number of optimizer steps applied so far, this one included.
        mode: `"explore"` (chosen after a backward), `"exploit"` (planned before it), `"probe"` (planned to update
            nothing), or `"skipped"` (non-finite).
        selected: names of the updated blocks.
        norms: global gradient norm of each block that had a gradient; after an early choice, of the chosen ones.
        grad_norm: norm over the updated blocks, which clipping compares with its limit; of a probe over all measured.
        epsilon: probability with which it was to explore, if the rule has one.
    """

    step: int
    mode: StepKind | Literal["skipped"]
    selected: tuple[str, ...]
    norms: dict[str, float]
    grad_norm: float
    epsilon: float | None


class Selection:
    """The selection state of a run; equal on every rank. Made by `agsel.attach`.

    Attributes:
        blocks: names of the blocks that take part, in forward order.
        policy: who is updated next; started.
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
        elements: str | None = None,
    ) -> None:
        self.blocks = tuple(block.name for block in blocks)
        self.policy = policy
        self.last: StepReport | None = None
        self.sanity = sanity
        self.residency = residency
        self.timetable = Timetable(residency)
        self._parameters = [block.trainable for block in blocks]
        self._group = group
        self._max_skipped_steps = max_skipped_steps
        self._skipped_in_a_row = 0
        self._elements = elements

    @property
    def counts(self) -> dict[str, int]:
        """How often each block was updated."""
        return dict(zip(self.blocks, self.policy.counts, strict=True))

    @property
    def resident(self) -> tuple[str, ...]:
        """Names of the blocks whose optimizer partition is on the accelerator now."""
        return tuple(self.blocks[index] for index in self.residency.resident_blocks())

    def state_dict(self) -> dict[str, Any]:
        """All that the coming selections depend on, as plain Python values; `engine.save_checkpoint` carries it."""
        state = {"blocks": list(self.blocks), "policy": self.policy.state_dict()}
        return state | ({"elements": self._elements} if self._elements else {})

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state_dict()`, and plan the next step from it.

        Raises:
            UserError: the state is of a run over other blocks, or other elements of their weights.
        """
        if state.get("elements") != self._elements:
            raise UserError(
                f"the saved run trains {state.get('elements') or 'whole weights'} and this one "
                f"{self._elements or 'whole weights'}, elements by number and checksum: use the mask of the saved run"
            )
        if tuple(state["blocks"]) != self.blocks:
            raise UserError(
                f"the saved selection is over {len(state['blocks'])} blocks ({state['blocks'][0]} ...), this run's "
                f"over {len(self.blocks)} ({self.blocks[0]} ...): use the model and blocks setting of the saved run"
            )
        self.policy.load_state_dict(state["policy"])
        self.plan_step()

    def adopt_states(self) -> None:
        """Take over the optimizer states that DeepSpeed holds, at the start and after a checkpoint load."""
        if self.sanity is not None:
            self.sanity.forget()
        wanted = () if self.probes_wanted else self.timetable.wanted_in_forward(self.policy.plan())
        self.residency.adopt(wanted)

    @property
    def probes_wanted(self) -> tuple[Probe, ...]:
        """What the policy asks for before it plans the step, which then waits for the step's first forward."""
        return () if self.policy.is_planned else self.policy.probes()

    def answer(self, losses: Sequence[float]) -> None:
        """Tell the policy the losses of the probes that it asked for; then it plans."""
        self.policy.observe(losses)
        self.policy.plan()
        self.plan_step()

    def plan_step(self) -> None:
        """Before the forward: freeze what the plan leaves out."""
        if self.probes_wanted:
            return
        plan = self.policy.plan()
        self.timetable.begin(plan)
        self._freeze_all_but(plan)

    def choose_early(self, local_squares: torch.Tensor, scale: float) -> Update | None:
        """After a step's first micro-batch: let its gradients choose for the whole step, and freeze what is left out.

        Args:
            local_squares: fp64 [blocks], sums of squares of this rank's gradient partitions so far.
            scale: what these gradients were multiplied by.

        Returns:
            What the step will do; None if a gradient is not finite, and the step goes on as it was planned.

        Raises:
            RanksDisagreeError: the ranks hold different selection states.
        """
        squares = global_squares(local_squares, checksum(self.state_dict()), self._group, self.policy.step + 1)
        if not all(map(math.isfinite, squares)):
            return None
        trainable = sorted(self.policy.plan().trainable)
        plan = self.policy.choose_early({index: math.sqrt(squares[index]) / scale for index in trainable})
        self.timetable.choose_early(plan)
        self._freeze_all_but(plan)
        return plan.update

    def commit(self, local_squares: torch.Tensor, loss_scale: float) -> Update | None:
        """After the backward: fix what the step does, on all ranks alike. None if it must be skipped.

        Args:
            local_squares: fp64 [blocks], sums of squares of this rank's (loss-scaled) gradient partitions.
            loss_scale: what the gradients were multiplied by.

        Raises:
            RanksDisagreeError: the ranks hold different selection states.
            RunError: too many steps in a row were skipped, or a planned block received no gradient.
        """
        plan = self.policy.plan()
        number = self.policy.step + 1
        squares = global_squares(local_squares, checksum(self.state_dict()), self._group, number)
        norms = {index: math.sqrt(squares[index]) / loss_scale for index in sorted(plan.trainable)}
        named = {self.blocks[index]: norm for index, norm in norms.items()}
        if not all(map(math.isfinite, squares)):
            self._skip(named)
            return None
        self._require_gradients(named)
        self._skipped_in_a_row = 0
        epsilon = self.policy.epsilon
        update = self.policy.commit(norms)
        self.timetable.settle(update)
        self.last = StepReport(
            step=self.policy.step,
            mode=plan.kind,
            selected=tuple(self.blocks[index] for index in sorted(update.blocks)),
            norms=named,
            grad_norm=math.hypot(*(norms[index] for index in sorted(update.blocks or plan.trainable))),
            epsilon=epsilon,
        )
        return update

    def drop_gradients(self) -> None:
        """Of the model's parameters; those that ZeRO has reduced stay."""
        for parameters in self._parameters:
            for parameter in parameters:
                parameter.grad = None

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

    def _freeze_all_but(self, plan: Plan) -> None:
        for index, parameters in enumerate(self._parameters):
            for parameter in parameters:
                parameter.requires_grad_(index in plan.trainable)

    def _skip(self, norms: dict[str, float]) -> None:
        self._skipped_in_a_row += 1
        self.last = StepReport(self.policy.step, "skipped", (), norms, math.inf, self.policy.epsilon)
        culprits = [name for name, norm in norms.items() if not math.isfinite(norm)]
        logger.warning("step skipped on all ranks: non-finite gradient in %s", ", ".join(culprits))
        if self._skipped_in_a_row >= self._max_skipped_steps:
            raise TooManySkippedStepsError(
                f"{self._skipped_in_a_row} steps in a row had a non-finite gradient (max_skipped_steps): "
                "lower the learning rate, look at the data, or use bf16 instead of fp16"
            )

    def _require_gradients(self, norms: dict[str, float]) -> None:
        """A block that should train but is cut off from the loss would silently stay as it is.

        Of an embedding, a batch may have none of the tokens that train.
        """
        silent = [name for name, norm in norms.items() if norm == 0 and name != EMBED]
        if silent and len(silent) < len(norms):
            raise RunError(
                f"no gradient reached {', '.join(silent)}: with gradient checkpointing set use_reentrant=False "
                "(gradient_checkpointing_kwargs)"
            )
