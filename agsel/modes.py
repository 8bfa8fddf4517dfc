"""Modules' training mode, which decides about dropout."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def evaluating(model: nn.Module, *, recomputing: bool = False) -> Iterator[None]:
    """Without dropout; every module goes on as it was afterwards.

    Args:
        model: in whatever mode.
        recomputing: leave modules with gradient checkpointing, which works in training mode only, in that.
    """
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = recomputing and bool(getattr(module, "gradient_checkpointing", False))
    try:
        yield
    finally:
        for module in training:
            module.training = True
