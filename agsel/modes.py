"""Modules' training mode, which decides about dropout, and with Liger about logits."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn

SKIP_LOGITS = "skip_logits"


@contextmanager
def evaluating(model: nn.Module, *, recomputing: bool = False) -> Iterator[None]:
    """Without dropout; every module goes on as it was afterwards.

    Args:
        model: in whatever mode.
        recomputing: leave modules with gradient checkpointing, which works in training mode only, in that; layers only
            until they run themselves.
    """
    from transformers.modeling_layers import GradientCheckpointingLayer  # slow to import, and rarely needed

    training = [module for module in model.modules() if module.training]
    with ExitStack() as stack:
        stack.callback(_train, training)
        for module in training:
            module.training = recomputing and bool(getattr(module, "gradient_checkpointing", False))
            if module.training and isinstance(module, GradientCheckpointingLayer):
                stack.enter_context(_recompute_in_evaluation(module))
        yield


def without_logits(model: nn.Module) -> dict[str, bool]:
    """Options of a forward by which Liger's, which computes the loss without logits in training, makes none either."""
    takes = (inspect.signature(module.forward).parameters for module in model.modules() if _has_head(module))
    return {SKIP_LOGITS: True} if any(SKIP_LOGITS in parameters for parameters in takes) else {}


def _has_head(module: nn.Module) -> bool:
    return getattr(module, "get_output_embeddings", None) is not None


def _train(modules: Iterable[nn.Module]) -> None:
    for module in modules:
        module.training = True


def _recompute_in_evaluation(module: nn.Module) -> ExitStack:
    """Keep a layer that is called through gradient checkpointing from dropout of its own."""

    def enter(*_: Any) -> None:
        module.training = False

    def leave(*_: Any) -> None:
        module.training = True

    stack = ExitStack()
    stack.callback(module.register_forward_pre_hook(enter).remove)
    stack.callback(module.register_forward_hook(leave, always_call=True).remove)  # recomputing ends early, by an error
    return stack
