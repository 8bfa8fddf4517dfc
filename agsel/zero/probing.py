"""Forwards that a policy asks for before a step: losses without gradient, the adapters of some blocks scaled.

The logits of all tokens can need more memory than a whole step that makes none. So a loss that is fused with the head
stays fused: TRL's because it is asked for in the forward's options, Liger's because it is told to.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from deepspeed import comm as dist
from torch import nn

from agsel.adapters import scaled_adapters
from agsel.blocks import decoder_layers
from agsel.errors import UserError
from agsel.modes import evaluating, without_logits
from agsel.policies import Probe

ITEMS = "num_items_in_batch"
"""What Trainers add so that the model returns something else than the mean loss of the rows."""


@torch.no_grad()
def losses_of(
    probes: Sequence[Probe],
    forward: Callable[..., Any],
    model: nn.Module,
    blocks: Sequence[str],
    inputs: tuple[Any, ...],
    options: dict[str, Any],
    group: Any,
) -> list[float]:
    """The mean loss of each probe over the ranks. Every rank must call it.

    Args:
        probes: what to do.
        forward: of the engine.
        model: of the engine.
        blocks: names of the blocks that take part.
        inputs: of the step's first forward, the batch's rows first.
        options: its keyword arguments, the same.
        group: the data-parallel process group.

    Raises:
        UserError: the model returns no loss, or a block that is suppressed has no adapters.
    """
    losses = []
    options = options | without_logits(model)
    with evaluating(model):
        for probe in probes:
            rows = max(1, probe.rows // dist.get_world_size(group))
            own = {name: first_rows(value, rows) for name, value in options.items() if name != ITEMS}
            with scaled_adapters(_layers(model, blocks, probe), probe.factor):
                loss = getattr(forward(*(first_rows(value, rows) for value in inputs), **own), "loss", None)
            if loss is None:
                raise UserError("the policy asks for losses and the model returns none: give the engine labels, too")
            losses.append(loss.double())
    means = torch.stack(losses)
    dist.all_reduce(means, group=group)
    return (means / dist.get_world_size(group)).tolist()


def first_rows(value: Any, rows: int) -> Any:
    """Of a tensor with a row for each example; anything else as it is."""
    return value[:rows] if torch.is_tensor(value) and value.dim() > 1 else value


def _layers(model: nn.Module, blocks: Sequence[str], probe: Probe) -> list[nn.Module]:
    layers = decoder_layers(model)
    return [layers[int(blocks[index].removeprefix("layers."))] for index in sorted(probe.suppressed)]
