"""Whole weights of a model that ZeRO-3 has divided among the ranks; of any other model they are whole anyway."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import deepspeed
import torch
from torch import nn

from agsel.blocks import decoder_layers


def whole(parameters: Iterable[nn.Parameter]) -> AbstractContextManager[None]:
    """While inside, every rank has these parameters whole. Every rank must enter it."""
    return deepspeed.zero.GatheredParameters(list(parameters))


@contextmanager
def whole_layer_by_layer(model: nn.Module) -> Iterator[None]:
    """While inside, forwards and backwards run without an engine: layers are gathered when they are needed.

    What is around the layers stays whole all the time.
    """
    layers = decoder_layers(model)
    inside = {id(parameter) for parameter in layers.parameters()}
    around = [parameter for parameter in model.parameters() if id(parameter) not in inside]
    with whole(around), layer_by_layer(layers, lambda layer: whole(layer.parameters())):
        yield


@contextmanager
def layer_by_layer(layers: Iterable[nn.Module], held: Callable[[nn.Module], AbstractContextManager]) -> Iterator[None]:
    """Hold each layer while it computes: in its forward, and in its backward until that of the next one begins."""
    with ExitStack() as stack, warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Full backward hook is firing")  # the first layer's inputs have none
        walked_back: list[_Layer] = []
        for layer in layers:
            handles = _Layer(layer, held, stack).hooks(walked_back)
            for handle in handles:
                stack.callback(handle.remove)
        yield


class _Layer:
    """A layer that is held from `hold` to `release`."""

    def __init__(self, layer: nn.Module, held: Callable[[nn.Module], AbstractContextManager], end: ExitStack) -> None:
        self._layer, self._held = layer, held
        self._holding: ExitStack | None = None
        end.callback(self.release)

    def hold(self, *_: Any) -> None:
        if self._holding is None:
            self._holding = ExitStack()
            self._holding.enter_context(self._held(self._layer))

    def release(self, *_: Any) -> None:
        if self._holding is not None:
            self._holding.close()
            self._holding = None

    def hooks(self, walked_back: list[_Layer]) -> list[Any]:
        """Registered; `walked_back` has the layer whose backward is going on."""

        def after_forward(*_: Any) -> None:
            recomputing = torch._C._current_graph_task_id() != -1  # under gradient checkpointing
            if not recomputing:
                self.release()

        def before_backward(*_: Any) -> None:
            while walked_back:  # all of its gradients have come
                walked_back.pop().release()
            self.hold()
            walked_back.append(self)

        return [
            self._layer.register_forward_pre_hook(self.hold),
            self._layer.register_forward_hook(after_forward),
            self._layer.register_full_backward_pre_hook(before_backward),
        ]
