"""Sums of gradients over many forwards and all ranks, of which each rank holds its share in fp32."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from agsel.elements.collectives import place
from agsel.errors import RunError


class GradientShares:
    """Takes gradients from their parameters as they come, so that never more than those of one layer are there.

    A rank's share of a weight is a slice of the flattened weight: the first rank has the first one, and all but the
    last ones are equally long. Layers are reduced one after another, the weights of each in their given order, zeros
    where a rank has no gradient: the ranks meet in the same collectives whatever part of a layer their rows have used.

    Args:
        layers: weights by name, of each decoder layer in forward order; all require a gradient.
        shapes: of all these weights when they are whole.
        device: of the shares.
        group: process group of the ranks; None without.

    Attributes:
        shares: fp32 [share of the rank] by the name of the weight.
    """

    def __init__(
        self,
        layers: Sequence[Mapping[str, nn.Parameter]],
        shapes: Mapping[str, torch.Size],
        device: torch.device,
        group: Any,
    ) -> None:
        self._layers = layers
        self._shapes = shapes
        self._device = device
        self._group = group
        self._rank, self._ranks = place(group)
        self.shares = {
            name: torch.zeros(self._own(name).stop - self._own(name).start, device=device)
            for layer in layers
            for name in layer
        }
        self._arrived: dict[str, Tensor] = {}
        self._next = len(layers) - 1

    def own_part(self, name: str, weight: Tensor) -> Tensor:
        """This rank's share of a whole weight, flat."""
        own = self._own(name)
        return weight.reshape(-1)[own.start : own.stop]

    def offset(self, name: str) -> int:
        """Where this rank's share begins in the flattened weight."""
        return self._own(name).start

    def watch(self) -> ExitStack:
        """Take every gradient from now on, until what is returned is closed."""
        stack = ExitStack()
        for number, layer in enumerate(self._layers):
            for name, parameter in layer.items():
                stack.callback(parameter.register_post_accumulate_grad_hook(self._taker(number, name)).remove)
        return stack

    def end_backward(self) -> None:
        """All gradients of a forward have come. Every rank must call it as often."""
        self._reduce_down_to(-1)
        self._next = len(self._layers) - 1

    def _taker(self, number: int, name: str) -> Any:
        def take(parameter: nn.Parameter) -> None:
            if number < self._next:  # the backward has left the layers above
                self._reduce_down_to(number)
            if number > self._next:
                raise RunError(f"the gradient of {name} came after its layer's turn: this model cannot be scored")
            assert parameter.grad is not None
            self._arrived[name], parameter.grad = parameter.grad, None

        return take

    def _reduce_down_to(self, number: int) -> None:
        for layer in reversed(self._layers[number + 1 : self._next + 1]):
            for name in layer:
                self.shares[name] += self._reduced(name, self._arrived.pop(name, None))
        self._next = number

    def _reduced(self, name: str, gradient: Tensor | None) -> Tensor:
        """This rank's share of the sum over the ranks."""
        numel = self._shapes[name].numel()
        if self._ranks == 1:
            return torch.zeros((), device=self._device) if gradient is None else gradient.reshape(-1)
        share = math.ceil(numel / self._ranks)
        flat = torch.zeros(share * self._ranks, device=self._device)
        if gradient is not None:
            flat[:numel] = gradient.reshape(-1)
        del gradient
        own = flat.new_empty(share)
        dist.reduce_scatter_tensor(own, flat, group=self._group)
        return own[: self.shares[name].numel()]

    def _own(self, name: str) -> slice:
        numel = self._shapes[name].numel()
        share = math.ceil(numel / self._ranks)
        return slice(min(self._rank * share, numel), min((self._rank + 1) * share, numel))
