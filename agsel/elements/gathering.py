"""Whole weights of a model that ZeRO-3 has divided among the ranks; of any other model they are whole anyway."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import deepspeed
import torch
from torch import nn

from agsel.blocks import decoder_layers


def whole(parameters: Iterable[nn.Parameter]) -> AbstractContextManager[None]:
    """While inside, every rank has these parameters whole. Every rank must enter it."""
    return deepspeed.zero.GatheredParameters(list(parameters))


class _Layer:
    """The weights of a decoder layer, there from `gather` to `release`."""

    def __init__(self, layer: nn.Module) -> None:
        self._parameters = list(layer.parameters())
        self._held: ExitStack | None = None

    def gather(self, *_: Any) -> None:
        if self._held is None:
            self._held = ExitStack()
            self._held.enter_context(whole(self._parameters))

    def release(self, *_: Any) -> None:
        if self._held is not None:
            self._held.close()
            self._held = None


@contextmanager
def whole_layer_by_layer(model: nn.Module) -> Iterator[None]:
    """While inside, forwards and backwards run without an engine: layers are gathered when they are needed.

    What is around the layers stays whole all the time.
    """
    layers = decoder_layers(model)
    inside = {id(parameter) for parameter in layers.parameters()}
    around = [parameter for parameter in model.parameters() if id(parameter) not in inside]
    with whole(around), ExitStack() as stack, warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Full backward hook is firing")  # the first layer's inputs have none
        walked_back: list[_Layer] = []
        for layer in layers:
            held = _Layer(layer)
            stack.callback(held.release)
            for handle in _hooks(layer, held, walked_back):
                stack.callback(handle.remove)
        yield


def _hooks(layer: nn.Module, held: _Layer, walked_back: list[_Layer]) -> list[Any]:
    def after_forward(*_: Any) -> None:
        recomputing = torch._C._current_graph_task_id() != -1  # under gradient checkpointing
        if not recomputing:
            held.release()

    def before_backward(*_: Any) -> None:
        while walked_back:  # all of its gradients have come
            walked_back.pop().release()
        held.gather()
        walked_back.append(held)

    return [
        layer.register_forward_pre_hook(held.gather),
        layer.register_forward_hook(after_forward),
        layer.register_full_backward_pre_hook(before_backward),
    ]
