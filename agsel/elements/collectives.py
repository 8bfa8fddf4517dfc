"""What the ranks of a group tell each other, or one process itself where there is no group."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def place(group: Any) -> tuple[int, int]:
    """This rank and the number of ranks."""
    return (dist.get_rank(group), dist.get_world_size(group)) if dist.is_initialized() else (0, 1)


def reduced(tensor: Tensor, group: Any, operation: Any = dist.ReduceOp.SUM) -> Tensor:
    """The same tensor with the sum over the ranks, or the result of another operation."""
    if dist.is_initialized():
        dist.all_reduce(tensor, operation, group=group)
    return tensor


def gathered(tensor: Tensor, group: Any) -> list[Tensor]:
    """Those of all ranks, which have one shape, by rank."""
    if not dist.is_initialized():
        return [tensor]
    tensors = [torch.empty_like(tensor) for _ in range(dist.get_world_size(group))]
    dist.all_gather(tensors, tensor, group=group)
    return tensors
