"""Adapters of PEFT inside the blocks of a model."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn

from agsel import upstream
from agsel.errors import RunError, UserError


def has_scalable_adapters(layer: nn.Module) -> bool:
    """Whether there is something in it that `scaled_adapters` can scale."""
    return any(hasattr(module, "lora_A") for module in layer.modules())


@contextmanager
def scaled_adapters(layers: Iterable[nn.Module], factor: float) -> Iterator[None]:
    """For a while, scale what the LoRA or DoRA adapters inside these layers add.

    Raises:
        UserError: a layer has none.
    """
    from peft.helpers import rescale_adapter_scale  # slow to import, and rarely needed

    with ExitStack() as stack:
        for layer in layers:
            try:
                stack.enter_context(rescale_adapter_scale(layer, factor))
            except ValueError as error:
                raise UserError("a layer has no LoRA adapters to scale: train adapters (--use_peft)") from error
        yield


def fuse_adapters(layers: Iterable[nn.Module], *, fold: bool = False) -> None:
    """Make PEFT's linear layers with LoRA adapters inside these layers `agsel.low_rank.FusedLinear`s, in place.

    Their results are PEFT's but for rounding. Warns, and leaves them alone, if this PEFT is not the tested one there.

    Args:
        layers: decoder layers; at ZeRO-3, each gathered as a whole.
        fold: in training add adapters to their weights for the moment, rounded to the weights' type: less arithmetic.

    Raises:
        UserError: adapters that are to be folded cannot be.
    """
    adapted = [module for layer in layers for module in layer.modules() if hasattr(module, "lora_A")]
    if not adapted:
        return
    if fold:
        _require_foldable(adapted)
    from agsel.low_rank import FusedLinear, Linear  # slow to import, and rarely needed

    try:
        upstream.require_tested(FusedLinear.__module__)
    except RunError as error:
        warnings.warn(f"adapters are computed by PEFT, which is slower: {error}", stacklevel=2)
        return
    for module in adapted:
        if type(module) is Linear:
            module.__class__ = FusedLinear
            vars(module)["folds"] = fold


def _require_foldable(modules: Iterable[Any]) -> None:
    for module in modules:
        if any(getattr(dropout, "p", 0) > 0 for dropout in module.lora_dropout.values()):
            raise UserError("adapters with dropout cannot be folded: set lora_dropout to 0, or do not fold them")
        if module.lora_variant:
            raise UserError("only ordinary LoRA adapters can be folded, not DoRA or other variants: do not fold them")
