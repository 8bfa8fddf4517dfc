"""Parameters as ZeRO-3 leaves them: each rank keeps a part, and only DeepSpeed's attributes tell what the whole is."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from deepspeed.runtime.zero.utils import is_zero_param
from torch import nn

from agsel.blocks import Block
from agsel.policies import BlockInfo


def global_shape(parameter: Any) -> torch.Size:
    """Shape of the whole parameter, also when ZeRO-3 has partitioned it."""
    return parameter.ds_shape if is_zero_param(parameter) else parameter.shape


def global_numel(parameters: Iterable[nn.Parameter]) -> int:
    """Number of elements of the whole parameters, also when ZeRO-3 has partitioned them."""
    return sum(global_shape(parameter).numel() for parameter in parameters)


def block_infos(blocks: Iterable[Block]) -> list[BlockInfo]:
    """Blocks as a policy knows them."""
    return [BlockInfo(block.name, global_numel(block.trainable)) for block in blocks]


def kept_by_rank(parameter: Any) -> torch.Tensor:
    """What this rank keeps of a parameter: at ZeRO-3 its partition, else all of it."""
    return parameter.ds_tensor if is_zero_param(parameter) else parameter
