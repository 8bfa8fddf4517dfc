"""Trained elements are written into the weights that hold them, once after each step: see `agsel.elements.layer`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import deepspeed
import torch
from deepspeed import comm as dist
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from torch import Tensor, nn

from agsel.elements import ElementLinear, element_layers, mask_of


class WriteThrough:
    """Writes the values of elements into their weights, whole ones and those that ZeRO-3 has partitioned.

    Args:
        model: of an engine.
    """

    def __init__(self, model: nn.Module) -> None:
        self._layers = {layer.values: layer for layer in element_layers(model).values()}
        self._own: dict[nn.Parameter, slice] = {}

    def write(self, parameters: Iterable[nn.Parameter]) -> None:
        """Of these parameters those that are values of elements; at stages 1 and 2."""
        for parameter in parameters:
            if parameter in self._layers:
                self._layers[parameter].write()

    @torch.no_grad()
    def write_partitions(self, parameters: Iterable[nn.Parameter]) -> None:
        """The same at stage 3, where a rank writes what belongs into its slice of a weight. Every rank must call it.

        And into the whole weight where ZeRO-3 keeps it, as nobody gathers it anew after a checkpoint is loaded.
        """
        values = [parameter for parameter in parameters if parameter in self._layers]
        if not values:
            return
        with deepspeed.zero.GatheredParameters(values):
            for parameter in values:
                layer: Any = self._layers[parameter]
                partition, own, start = self._slice(layer)
                partition.scatter_(0, layer.indices[own] - start, parameter[own])
                if layer.weight.ds_status is ZeroParamStatus.AVAILABLE:
                    layer.write()

    def _slice(self, layer: ElementLinear) -> tuple[Tensor, slice, int]:
        """This rank's slice of a weight, which of the elements are in it, and where it begins."""
        weight: Any = layer.weight
        partition = weight.ds_tensor
        start = dist.get_rank(weight.ds_process_group) * partition.ds_numel
        if layer.values not in self._own:
            borders = torch.tensor([start, start + partition.ds_numel], dtype=torch.int32, device=layer.indices.device)
            self._own[layer.values] = slice(*torch.searchsorted(layer.indices, borders).tolist())
        return partition, self._own[layer.values], start


def describe_elements(model: nn.Module) -> str | None:
    """What must be equal on all ranks of a model with elements, and in its checkpoints, which hold the values alone."""
    mask = mask_of(model)
    return f"{mask.numel:,} ({mask.checksum:08x})" if mask.numel else None
