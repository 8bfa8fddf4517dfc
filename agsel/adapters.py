"""Adapters of PEFT inside the blocks of a model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager

from torch import nn

from agsel.errors import UserError


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
