"""ZeRO-3: weights that are needed together are gathered in one piece, and taken apart together.

DeepSpeed's own gather is one piece, too, but takes it apart weight by weight and rank by rank, which keeps the host
longer than the GPU needs for a small layer; and the host may run ahead by three weights, which is less than a layer.
"""

from __future__ import annotations

from collections.abc import Iterable, MutableMapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from deepspeed import comm as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from deepspeed.runtime.zero.partitioned_param_coordinator import InflightParamRegistry


class JointGather:
    """Weights on their way to this rank; `wait` makes all of them available.

    Takes the place of DeepSpeed's handle of an all-gather.

    Args:
        parameters: partitioned, none available; of one type, on the same ranks.
        in_flight: DeepSpeed's handles by parameter. All of these leave it in `wait`, so that DeepSpeed asks once, not
            for every parameter, how far the GPU is.
    """

    def __init__(self, parameters: Iterable[Any], in_flight: MutableMapping[Any, Any]) -> None:
        self._parameters = sorted(parameters, key=lambda parameter: parameter.ds_id)  # in one order on all ranks
        self._in_flight = in_flight
        pieces = [parameter.ds_tensor for parameter in self._parameters]
        self._sizes = [piece.ds_numel for piece in pieces]
        group = self._parameters[0].ds_process_group
        self._gathered = pieces[0].new_empty(dist.get_world_size(group), sum(self._sizes))
        own = self._gathered[dist.get_rank(group)]
        torch.cat(pieces, out=own)
        self._work = dist.allgather_fn(self._gathered.view(-1), own, group=group, async_op=True)
        for parameter in self._parameters:
            parameter.ds_status = ZeroParamStatus.INFLIGHT

    def wait(self, **_: Any) -> None:
        """Let the current stream wait, and point the parameters to their weights. A second call does nothing."""
        if self._work is None:
            return
        self._work.wait()
        if self._gathered.is_cuda:  # DeepSpeed may wait on another stream than it gathered on
            self._gathered.record_stream(torch.cuda.current_stream(self._gathered.device))
        ranks = len(self._gathered)
        wholes = [self._gathered.new_empty(ranks, size) for size in self._sizes]
        pieces = self._gathered.split(self._sizes, dim=1)
        # Not split_with_sizes_copy: it sends a table to the device, behind all optimizer states on their way there.
        torch._foreach_copy_([row for whole in wholes for row in whole], [row for piece in pieces for row in piece])
        for parameter, whole in zip(self._parameters, wholes, strict=True):
            parameter.data = whole.view(-1)[: parameter.ds_numel].view(parameter.ds_shape)  # without the padding
            parameter.ds_status = ZeroParamStatus.AVAILABLE
            self._in_flight.pop(parameter, None)
        self._work = self._gathered = None


class Registry(InflightParamRegistry):
    """DeepSpeed's handles of weights in flight, which it waits for in turn; the first lets all of its gather leave."""

    def items(self) -> Any:
        """A copy."""
        return list(super().items())


def gather_jointly(module: Any) -> ExitStack:
    """Let DeepSpeed gather the weights of a ZeRO-3 module by `JointGather`, wherever it can.

    Closing what is returned undoes it; once, because another engine may train the module then.
    """
    in_flight = module.ds_inflight_param_registry
    undo = ExitStack()
    undo.callback(setattr, in_flight, "__class__", type(in_flight))
    in_flight.__class__ = Registry
    for parameter in module.parameters():
        stock = parameter.all_gather_coalesced
        undo.callback(setattr, parameter, "all_gather_coalesced", stock)
        parameter.all_gather_coalesced = partial(_gather, stock, in_flight)
    return undo


def gather_now(parameters: Sequence[Any]) -> None:
    """Make partitioned weights available by a `JointGather`, if they fit together; else leave them to DeepSpeed."""
    if parameters and _fit_together(parameters):
        JointGather(parameters, {}).wait()


def _gather(stock: Any, in_flight: Any, parameters: Iterable[Any], quantize: bool = False, **options: Any) -> Any:
    """What a parameter's `all_gather_coalesced` does."""
    parameters = list(parameters)
    if not parameters or quantize or not _fit_together(parameters):
        return stock(parameters, quantize=quantize, **options)
    return JointGather(parameters, in_flight)


def _fit_together(parameters: Sequence[Any]) -> bool:
    """Whether these are plain partitions of one type on the accelerator, on the same ranks of which there are several.

    They are not if they are quantized (qwZ), have a second copy on each host (hpZ), or if one is an adapter in fp32.
    """
    group, dtype = parameters[0].ds_process_group, parameters[0].ds_tensor.dtype
    device = get_accelerator().device_name()
    return dist.get_world_size(group) > 1 and all(
        parameter.ds_process_group is group
        and parameter.ds_tensor.dtype == dtype
        and parameter.ds_tensor.device.type == device
        and parameter.ds_secondary_tensor is None
        and not hasattr(parameter.ds_tensor, "ds_quant_scale")
        for parameter in parameters
    )
