"""What one rank's GPU holds while elements are chosen: see `agsel.elements.gradients`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from agsel.blocks import decoder_layers
from agsel.elements.whole_weights import layer_by_layer
from agsel.planning.rehearsal.engines import Rank
from agsel.planning.rehearsal.ledger import Ledger
from agsel.planning.rehearsal.workload import Step, Workload


class Choosing(Rank):
    """Whole weights, fp32 shares of all gradients, and the gradients of one layer; no optimizer."""

    def begin(self) -> None:
        """The shares are there from the start."""
        super().begin()
        self._shares = [self._share(index) for index in self._step.trainable]

    def finish(self) -> None:
        """The lowest layer is left."""
        self._reduce()

    def update(self) -> None:
        """There is none."""

    def _on_gradient(self, parameter: nn.Parameter) -> None:
        if self._waiting and self._group_of[self._waiting[0]] != self._group_of[parameter]:
            self._reduce()
        self._waiting.append(parameter)

    def _reduce(self) -> None:
        """One matrix after another; a single rank adds gradients to its shares as they are."""
        for parameter in self._waiting:
            numel = self._numels[parameter]
            together = self._ledger.allocate("buffers", numel if self._ranks > 1 else 0, torch.float32)
            parameter.grad = None
            own = self._ledger.allocate("buffers", -(-numel // self._ranks) if self._ranks > 1 else 0, torch.float32)
            del together, own
        self._waiting.clear()

    def _share(self, index: int) -> torch.Tensor:
        return self._ledger.allocate("gradients", self._partition(index), torch.float32)

    def _load_weights(self) -> None:
        with self._ledger.counting("weights"):
            self._ledger.enter(self._parameters)

    def _hold_earlier_gradients(self) -> None:
        """Every micro-batch is reduced."""


class ChoosingPartitioned(Choosing):
    """ZeRO-3 without an engine: slices, what is around the layers, and one layer at a time."""

    def __init__(self, model: Any, workload: Workload, step: Step, ledger: Ledger) -> None:
        super().__init__(model, workload, step, ledger)
        self._layers = decoder_layers(model)
        self._shapes = {parameter: parameter.shape for parameter in self._layers.parameters()}

    @contextmanager
    def hooks(self) -> Iterator[None]:
        """Be told of every gradient, and of the beginning and end of every layer."""
        with super().hooks(), layer_by_layer(self._layers, self._whole):
            yield
        for layer in self._layers:
            self._obtain(layer)

    def _load_weights(self) -> None:
        self._slices = self._allocate("weights", sum(-(-numel // self._ranks) for numel in self._numels.values()))
        for layer in self._layers:
            self._give_up(layer)
        super()._load_weights()

    @contextmanager
    def _whole(self, layer: nn.Module) -> Iterator[None]:
        with self._ledger.counting("weights"):
            self._obtain(layer)
        yield
        self._give_up(layer)

    def _obtain(self, layer: nn.Module) -> None:
        for parameter in layer.parameters():
            parameter.data = torch.empty(self._shapes[parameter], dtype=parameter.dtype, device="meta")

    def _give_up(self, layer: nn.Module) -> None:
        for parameter in layer.parameters():
            parameter.data = torch.empty(0, dtype=parameter.dtype, device="meta")
