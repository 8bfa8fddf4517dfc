"""ZeRO stages 1 and 2: one flat bit16 buffer and one fp32 partition per param group, that is, per block."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from deepspeed import comm as dist
from deepspeed.runtime.utils import all_gather_dp_groups
from deepspeed.runtime.zero.stage_1_and_2 import INITIAL_MICRO_STEP_ID, DeepSpeedZeroOptimizer

from agsel.zero.residency import Partition
from agsel.zero.selective_step import SelectiveStep


class SelectiveZeroOptimizer(SelectiveStep, DeepSpeedZeroOptimizer):
    """DeepSpeed's ZeRO-1/2 optimizer that keeps gradients, steps and gathers for the selected blocks only."""

    reduce_scatter: bool

    stock = DeepSpeedZeroOptimizer
    relies_on = (
        "initialize_optimizer_states",
        "backward_prologue",
        "step",
        "_optimizer_step",
        "_lazy_init_hp_params_optimizer_state",
        "independent_gradient_partition_epilogue",
        "get_all_grad_tensors",
        "get_flat_partition",
        "_build_compact_grad_partition_buffer",
        "reduce_independent_p_g_buckets_and_remove_grads",
        "reduce_ipg_grads",
        "average_tensor",
        "gradient_reduction_w_predivide",
        "copy_grads_in_partition",
        "get_gradient_for_reduction",
        "report_ipg_memory_usage",
        "_use_compact_grad_partition_buffer",
        "free_grad_in_param_list",
        "_load_universal_checkpoint",
        "_link_all_hp_params",
        "load_hp_checkpoint_state_from_checkpoint_dir",
        "update_lp_params",
    )
    """Methods of the stock class that this class replaces or whose inner working it depends on."""

    def masters(self) -> list[torch.Tensor]:
        """The fp32 partition of every param group."""
        return list(self.single_partition_of_fp32_groups)

    def partitioned_groups(self) -> set[int]:
        """The param groups that have a partition: all, DeepSpeed fails at a group without a trainable parameter."""
        return set(range(len(self.bit16_groups)))

    def parameters_of_partition(self, index: int) -> list[torch.nn.Parameter]:
        """The model parameters of a param group."""
        return list(self.bit16_groups[index])

    def prepare_selection(self) -> None:
        """Drop the views into fp32 partitions that DeepSpeed hangs on parameters: they would pin evicted memory.

        And where DeepSpeed would all-reduce slices of a bucket, let it all-reduce the whole, in place: the same numbers
        with less Python.
        """
        if self.reduce_scatter and self.use_multi_rank_bucket_allreduce:
            self.reduce_scatter = self.postscale_gradients = False
        self._being_reduced: torch.Tensor | None = None
        for group in self.bit16_groups:
            for parameter in group:
                parameter._hp_mapping = None

    def get_all_grad_tensors(self, tensor_list: Sequence[torch.nn.Parameter], dtype: torch.dtype) -> list[torch.Tensor]:
        """Stock allocates zeros for parameters without a gradient; a frozen block gets nothing."""
        if _is_frozen(tensor_list):
            return []
        return super().get_all_grad_tensors(tensor_list, dtype)

    def get_flat_partition(self, tensor_list: Any, *args: Any, param_group_idx: int, **kwargs: Any) -> Any:
        """Stock pads a partition without gradients with zeros; a frozen block gets nothing."""
        if _is_frozen(self.bit16_groups[param_group_idx]):
            return []
        return super().get_flat_partition(tensor_list, *args, param_group_idx=param_group_idx, **kwargs)

    def _build_compact_grad_partition_buffer(self, group_idx: int) -> Any:
        """Stock makes a zero fp32 partition for groups without gradients; a frozen block gets nothing."""
        if _is_frozen(self.bit16_groups[group_idx]):
            return None
        return super()._build_compact_grad_partition_buffer(group_idx)

    def average_tensor(self, tensor: torch.Tensor, communication_data_type: torch.dtype) -> None:
        """Stock lets go of a gradient larger than a bucket while its reduction on another stream is still to come.

        Here it lives until the next reduction, before which stock makes the compute stream wait for this one.
        """
        previous, self._being_reduced = self._being_reduced, tensor
        super().average_tensor(tensor, communication_data_type)
        del previous

    def independent_gradient_partition_epilogue(self) -> None:
        """Stock waits for the last reduction here."""
        super().independent_gradient_partition_epilogue()
        self._being_reduced = None

    def copy_grads_in_partition(self, param: torch.nn.Parameter, group_idx: int | None = None) -> None:
        """Stock copies into one buffer as large as all groups; here each gradient gets memory of its own."""
        index = self._get_param_group_idx(param) if group_idx is None else group_idx
        if self._use_compact_grad_partition_buffer(index):
            super().copy_grads_in_partition(param, group_idx)
            return
        gradient = self.get_gradient_for_reduction(param)
        gradient.data = gradient.detach().clone()  # from the bucket, which the next gradients will overwrite

    def report_ipg_memory_usage(self, *_: Any, **__: Any) -> None:
        """Stock formats lines for a memory log several times per gradient, and never logs them."""

    def _lazy_init_hp_params_optimizer_state(self) -> None:
        """Stock links parameters to their optimizer state here; see `prepare_selection`."""

    def _load_universal_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        """Stock writes through the views that `prepare_selection` drops; link them to where the masters are now."""
        self._link_all_hp_params()
        super()._load_universal_checkpoint(*args, **kwargs)
        self.prepare_selection()

    def _begin_step(self) -> None:
        self.micro_step_id = INITIAL_MICRO_STEP_ID

    def _gradient_pieces(self, partition: Partition) -> list[torch.Tensor]:
        return list(self.averaged_gradients.get(partition.index) or [])

    def _release_gradients(self, partitions: Iterable[Partition]) -> None:
        for partition in partitions:
            self.averaged_gradients[partition.index] = None
            self.all_grad_tensors[partition.index] = None
            self.free_grad_in_param_list(self.bit16_groups[partition.index])

    def _publish(self, partitions: Sequence[Partition]) -> None:
        indices = [partition.index for partition in partitions]
        for partition in partitions:
            rank = dist.get_rank(group=self.real_dp_process_group[partition.index])
            self.parallel_partitioned_bit16_groups[partition.index][rank].data.copy_(partition.master.data)
        all_gather_dp_groups(
            groups_flat=[self.bit16_groups_flat[index] for index in indices],
            partitioned_param_groups=[self.parallel_partitioned_bit16_groups[index] for index in indices],
            dp_process_group=[self.real_dp_process_group[index] for index in indices],
            start_alignment_factor=self.nccl_start_alignment_factor,
            allgather_bucket_size=self.allgather_bucket_size,
        )


def _is_frozen(parameters: Sequence[torch.nn.Parameter]) -> bool:
    return bool(parameters) and not any(parameter.requires_grad for parameter in parameters)
