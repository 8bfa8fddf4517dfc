"""ZeRO stage 3: parameters themselves are partitioned; a block's partition is one or more sub-groups of its group."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.runtime.zero.parameter_offload import DeepSpeedZeRoOffload
from deepspeed.runtime.zero.partition_parameters import Init
from deepspeed.runtime.zero.partitioned_param_coordinator import InflightParamRegistry, PartitionedParameterCoordinator
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.utils import set_z3_leaf_module, z3_leaf_module
from torch.utils.hooks import RemovableHandle

from agsel.blocks import decoder_layers, hidden_states
from agsel.errors import UserError
from agsel.zero.gathering import gather_jointly, gather_now
from agsel.zero.parameters import global_numel
from agsel.zero.residency import Partition
from agsel.zero.selective_step import SelectiveStep

RELIES_ON = {
    DeepSpeedZeroOptimizer_Stage3: (
        "_restore_from_bit16_weights",
        "_setup_for_real_optimizer",
        "create_reduce_and_remove_grad_hooks",
        "partition_grads",
        "_load_universal_checkpoint",
        "load_hp_checkpoint_state_from_checkpoint_dir_stage3",
        "load_module_checkpoint_state_from_checkpoint_dir_stage3",
        "load_hp_checkpoint_state",
        "checkpoint_event_prologue",
        "checkpoint_event_epilogue",
    ),
    DeepSpeedZeRoOffload: ("setup_zero_stage3_hooks", "_remove_module_hooks", "_register_deepspeed_module"),
    PartitionedParameterCoordinator: (
        "is_record_trace",
        "reset_step",
        "_invalidate_trace",
        "_clean_inflight_param_registry",
        "_fetch_sub_module_impl",
        "__all_gather_params",
        "__all_gather_params_",
        "release_sub_module",
        "release_and_reset_all",
    ),
    InflightParamRegistry: ("__setitem__",),
    Init: ("_convert_to_deepspeed_param", "_all_gather", "_partition_param"),
}
"""Methods of DeepSpeed whose inner working agsel depends on, besides those that the code names."""

GRADIENT_MAP = "_DeepSpeedZeroOptimizer_Stage3__param_id_to_grad_partition"
GATHER_STREAM = "_DeepSpeedZeRoOffload__allgather_stream"
PREFETCH_BUCKET = "_PartitionedParameterCoordinator__prefetch_bucket_sz"


class GradientPartitions(dict[int, torch.Tensor]):
    """DeepSpeed's map from parameter id to gradient partition, with memory only for blocks that got a gradient.

    Stock keeps one flat buffer for all trainable parameters for the whole run, which also re-applies last step's
    gradient when a parameter gets none. Here a sub-group's buffer is made, zeroed, when its first gradient is reduced.
    """

    def __init__(self, sub_groups: Sequence[Sequence[Any]], dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self._sub_groups = sub_groups
        self._sub_group_of = {p.ds_id: index for index, group in enumerate(sub_groups) for p in group}
        self._dtype, self._device = dtype, device
        self.flat: dict[int, torch.Tensor] = {}

    def __missing__(self, ds_id: int) -> torch.Tensor:
        index = self._sub_group_of[ds_id]
        numels = [parameter.partition_numel() for parameter in self._sub_groups[index]]
        self.flat[index] = torch.zeros(sum(numels), dtype=self._dtype, device=self._device)
        for parameter, piece in zip(self._sub_groups[index], self.flat[index].split(numels), strict=True):
            self[parameter.ds_id] = piece
        return self[ds_id]

    def release(self, sub_group: int) -> None:
        """Forget the gradient of a sub-group."""
        if self.flat.pop(sub_group, None) is not None:
            for parameter in self._sub_groups[sub_group]:
                del self[parameter.ds_id]


class SelectiveZeroOptimizerStage3(SelectiveStep, DeepSpeedZeroOptimizer_Stage3):
    """DeepSpeed's ZeRO-3 optimizer that keeps gradients and steps for the selected blocks only."""

    module: torch.nn.Module
    fp16_groups: list[Any]
    grad_partitions_flat_buffer: torch.Tensor

    stock = DeepSpeedZeroOptimizer_Stage3

    def masters(self) -> list[torch.Tensor]:
        """The fp32 partition of every sub-group."""
        return list(self.fp32_partitioned_groups_flat)

    def partitioned_groups(self) -> set[int]:
        """The param groups that have a partition: DeepSpeed silently drops those without a trainable parameter."""
        return set(self.sub_group_to_group_id.values())

    def parameters_of_partition(self, index: int) -> list[torch.nn.Parameter]:
        """The model parameters of a sub-group."""
        return list(self.fp16_groups[index])

    def prepare_selection(self) -> None:
        """Replace the flat gradient buffer of the whole model by buffers of the blocks that have a gradient.

        And let DeepSpeed gather the weights of a decoder layer as a whole.
        """
        self._zero_padding()
        stock_buffer = self.grad_partitions_flat_buffer
        self._gradients = GradientPartitions(self.fp16_groups, stock_buffer.dtype, stock_buffer.device)
        self.grad_partitions_flat_buffer = stock_buffer.new_empty(0)
        setattr(self, GRADIENT_MAP, self._gradients)
        self._gather_stream: Any = getattr(self.parameter_offload, GATHER_STREAM)
        self._undo = gather_jointly(self.module)
        self._gather_whole_layers()

    def _zero_padding(self) -> None:
        """DeepSpeed fills parameters up for the last ranks with whatever is in memory, and saves it with the states.

        It would tell the checkpoints of equal runs apart, and may be NaN.
        """
        rank = dist.get_rank(self.dp_process_group)
        weights: list[Any] = [*self.module.parameters()]
        pieces = [(weight, weight.ds_tensor) for weight in weights]
        for parameters, master in zip(self.fp16_groups, self.masters(), strict=True):
            numels = [parameter.partition_numel() for parameter in parameters]
            pieces += zip(parameters, master.detach().split(numels), strict=True)
        for parameter, piece in pieces:
            piece[max(0, parameter.ds_numel - rank * piece.numel()) :].zero_()

    def _gather_whole_layers(self) -> None:
        """For small layers, DeepSpeed's hooks on each module inside take the host longer than the GPU computes.

        So that a layer is there when the one before has been computed, as much is gathered ahead of time at least.
        Not before `deepspeed.initialize`: the hooks that reduce gradients would then make some for frozen weights.
        """
        layers = decoder_layers(self.module)
        for layer in layers:
            if not z3_leaf_module(layer):
                set_z3_leaf_module(layer, True)
                self._undo.callback(_unmake_leaf, layer)
        self.parameter_offload._remove_module_hooks()
        self.parameter_offload.setup_zero_stage3_hooks()
        coordinator = self._get_param_coordinator()
        if bucket := getattr(coordinator, PREFETCH_BUCKET):  # 0 turns it off
            largest = max(global_numel(layer.parameters()) for layer in layers)
            setattr(coordinator, PREFETCH_BUCKET, max(bucket, largest))

    def watch(self, engine: Any) -> list[RemovableHandle]:
        """Let the backward that DeepSpeed records, to gather weights ahead of time by it, go down to the first layer.

        DeepSpeed accepts a shorter backward than the recorded one, but forgets the record at a longer one: with frozen
        layers at the bottom, prefetching would stop for two steps whenever a lower layer is selected than ever before.
        DeepSpeed gives back the weights of a layer by the gradients of its positional arguments.
        """

        def on_forward(_: torch.nn.Module, arguments: tuple[Any, ...]) -> None:
            hidden = hidden_states(*arguments)
            if hidden is None:
                raise UserError(
                    "a model that calls its layers by keyword is not supported at zero_optimization.stage 3: use stage "
                    "2, or let it call layer(hidden_states, ...)"
                )
            if torch.is_grad_enabled() and self._get_param_coordinator().is_record_trace():
                hidden.requires_grad_()

        return [decoder_layers(engine.module)[0].register_forward_pre_hook(on_forward)]

    def destroy(self) -> None:
        """Give the model back without leaf modules: another `deepspeed.initialize` would make gradients for them."""
        super().destroy()
        self._undo.close()

    def _get_fp32_opt_state_partition(self, *args: Any, **kwargs: Any) -> Any:
        """DeepSpeed's `safe_get_full_...` and `safe_set_full_...` start here; states may be on their way."""
        self.selection.residency.synchronize()
        return super()._get_fp32_opt_state_partition(*args, **kwargs)

    def reduce_ready_partitions_and_remove_grads(self, param: Any) -> None:
        """Stock's leaf modules, as mixtures of experts are, make zero gradients for frozen weights, too; drop those."""
        if param.requires_grad:
            super().reduce_ready_partitions_and_remove_grads(param)
        else:
            param.grad = None

    def independent_gradient_partition_epilogue(self) -> None:
        """Stock makes zero gradients for frozen parameters; hide their sub-groups from it."""
        sub_groups = self.fp16_groups
        self.fp16_groups = [group if group[0].requires_grad else [] for group in sub_groups]
        try:
            super().independent_gradient_partition_epilogue()
        finally:
            self.fp16_groups = sub_groups

    def _begin_step(self) -> None:
        self._pre_step()
        self._partition_all_parameters()

    def _gradient_pieces(self, partition: Partition) -> list[torch.Tensor]:
        flat = self._gradients.flat.get(partition.index)
        if flat is None:
            return []
        if flat.is_cuda:  # it was allocated on DeepSpeed's reduction stream
            flat.record_stream(torch.cuda.current_stream(flat.device))
        return [flat]

    def _release_gradients(self, partitions: Iterable[Partition]) -> None:
        for partition in partitions:
            self.averaged_gradients[partition.index] = None
            self._gradients.release(partition.index)

    def _publish(self, partitions: Sequence[Partition]) -> None:
        for partition in partitions:
            self._reassign_or_swap_out_partitioned_parameters(partition.index)
        self.write_elements(partitions)
        if self._gather_stream is not None:  # stock may gather weights for the next forward before they are written
            self._gather_stream.wait_stream(torch.cuda.current_stream())
        gather_now(self.persistent_parameters)  # `_post_step` would gather them one by one
        self._post_step(set())

    def write_elements(self, partitions: Iterable[Partition]) -> None:
        """Write the trained elements of these partitions, if there are any, into their weights."""
        self.elements.write_partitions(p for partition in partitions for p in self.fp16_groups[partition.index])


def _unmake_leaf(layer: torch.nn.Module) -> None:
    set_z3_leaf_module(layer, False)
    for parameter in layer.parameters():
        vars(parameter).pop("ds_z3_leaf_module", None)
