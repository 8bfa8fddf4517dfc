"""When in a step optimizer partitions change places: beside the forward and the backward, a part with every layer."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from enum import IntEnum
from typing import Any, TypeVar

import torch
from deepspeed.runtime.engine import DeepSpeedEngine
from torch import nn
from torch.utils.hooks import RemovableHandle

from agsel.blocks import Block, decoder_layers, hidden_states
from agsel.policies import Plan, Update
from agsel.zero.residency import Residency

SHARE_IN_FORWARD = 0.8
"""Of the optimizer states that a step is known to need: how many have room on the device while activations are at their
peak. The others come in its backward, when activations are freed. With fewer, memory would only fall further below what
exploring steps need."""

LEAVING_IN_BACKWARD = 1 / 2
"""Of the optimizer states that a step sends to the host: how many wait for its backward, which takes half of the time
if some layers are frozen; if their room is given back, none."""

Item = TypeVar("Item")


class Moment(IntEnum):
    """When in a step optimizer partitions start to move."""

    FORWARD = 1
    BACKWARD = 2
    LATE_BACKWARD = 3


class Timetable:
    """Follows one step after another and tells the residency what to move.

    Args:
        residency: of the optimizer partitions.
    """

    def __init__(self, residency: Residency) -> None:
        self._residency = residency
        self._plan: Plan | None = None
        self._moved: Moment | None = None
        self._bytes_for_backward = 0.0
        self._layers_to_leave = 0
        self._last_explored: frozenset[int] = frozenset()

    def begin(self, plan: Plan) -> None:
        """A step is planned."""
        self._plan = plan
        self._moved = None
        self._layers_to_leave = 0

    def wanted_in_forward(self, plan: Plan) -> tuple[int, ...]:
        """Indices of the blocks whose optimizer partitions have room on the device from the start of the forward.

        On an exploring plan none: the choice is not known yet, and the activations of all blocks need the memory. All,
        where those that leave the device for a moment would lose their moments.
        """
        if plan.update is None:
            return ()
        blocks = sorted(plan.update.blocks - self._residency.pinned)
        return early(blocks, self._residency.resident_blocks()) if self._residency.keeps_moments else tuple(blocks)

    def move(self, moment: Moment) -> None:
        """Decide, once per step, where the plan wants optimizer partitions to be from this moment on.

        They travel while the step computes, a part with each layer that it enters or leaves. Between a step and the
        plan of the next one, which may wait for probes, nothing moves.
        """
        if self._plan is not None and (self._moved is None or moment > self._moved):
            self._residency.keep_only(self._wanted(self._plan, moment))
            self._moved = moment
            if moment is Moment.FORWARD:
                most = LEAVING_IN_BACKWARD * self._residency.leaving_bytes
                self._bytes_for_backward = min(most, self._residency.exchanged_bytes)
            elif moment is Moment.BACKWARD and not self._layers_to_leave:
                self._residency.send()

    def enter_layer(self, hidden: torch.Tensor | None, remaining: int) -> None:
        """A forward reaches a decoder layer.

        Args:
            hidden: the layer's input, whose gradient tells that the backward is through with the layer.
            remaining: layers from here to the last, this one included.
        """
        self.move(Moment.FORWARD)
        if self._moved is not Moment.FORWARD:
            return  # another micro-batch, or a backward that computes the layer again
        self._residency.send((self._residency.leaving_bytes - self._bytes_for_backward) / remaining)
        if hidden is not None and hidden.requires_grad:
            self._layers_to_leave += 1
            hidden.register_hook(lambda _: self._leave_layer())

    def choose_early(self, plan: Plan) -> None:
        """An exploring step has chosen after its first micro-batch: the next one moves what it needs."""
        if plan.update is not None:
            self._last_explored = plan.update.blocks
        self.begin(plan)

    def settle(self, update: Update) -> None:
        """What the step does is known: bring all of its partitions."""
        if self._plan is not None and self._plan.update is None:
            self._last_explored = update.blocks
        self._plan = None
        self._residency.keep_only(update.blocks)
        self._residency.send()

    def watch(self, engine: DeepSpeedEngine, blocks: Sequence[Block]) -> list[RemovableHandle]:
        """Let an engine's model tell how far a step has come. Returns the hooks.

        It begins at the first layer: models read a value from the device while they make the attention mask, which
        would queue behind the copies. `SelectiveStep.backward_prologue` comes in for a backward that leaves no layer.
        """

        def on_gradient(_: nn.Parameter) -> None:
            if engine.is_gradient_accumulation_boundary():
                self.move(Moment.LATE_BACKWARD)

        hooks = [block.trainable[0].register_post_accumulate_grad_hook(on_gradient) for block in late(blocks)]
        layers = decoder_layers(engine.module)
        for index, layer in enumerate(layers):

            def on_entry(
                _: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any], remaining: int = len(layers) - index
            ) -> None:
                self.enter_layer(hidden_states(*arguments, *keywords.values()), remaining)

            hooks.append(layer.register_forward_pre_hook(on_entry, with_kwargs=True))
        return hooks

    def _leave_layer(self) -> None:
        """The backward is through with a layer."""
        self._residency.send(self._residency.leaving_bytes / max(1, self._layers_to_leave))
        self._layers_to_leave -= 1

    def _wanted(self, plan: Plan, moment: Moment) -> Collection[int]:
        """On an exploring plan the last moment's guess is the last exploring step's choice; most will be right."""
        if moment is not Moment.LATE_BACKWARD:
            return self.wanted_in_forward(plan)
        return plan.update.blocks if plan.update else self._last_explored


def early(blocks: Sequence[int], resident: Collection[int] = ()) -> tuple[int, ...]:
    """Of the movable blocks that a step will update, those that have room on the device from the start of its forward.

    The resident ones come first, so that as little as possible is moved.
    """
    resident_first = sorted(blocks, key=lambda block: block not in resident)
    return tuple(resident_first[: math.ceil(SHARE_IN_FORWARD * len(blocks))])


def late(blocks: Sequence[Item]) -> Sequence[Item]:
    """Of all blocks in forward order, those whose gradients tell that a third of the backward is over.

    Freed activations then leave room for the states that are still missing. Which of them get a gradient differs from
    step to step.
    """
    return blocks[: len(blocks) * 2 // 3 + 1]
