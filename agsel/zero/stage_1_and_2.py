"""ZeRO stages 1 and 2: one flat bit16 buffer and one fp32 partition per param group, that is, per block."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from deepspeed import comm as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.torch_autocast import sort_dtypes
from deepspeed.runtime.utils import all_gather_dp_groups
from deepspeed.runtime.zero.stage_1_and_2 import INITIAL_MICRO_STEP_ID, DeepSpeedZeroOptimizer

from agsel.errors import RunError
from agsel.zero.residency import Partition
from agsel.zero.selective_step import SelectiveStep

RELIES_ON = {
    DeepSpeedZeroOptimizer: (
        "_restore_from_bit16_weights",
        "gradient_reduction_w_predivide",
        "_add_full_reduction_to_compact_grad_partition",
        "process_gradients",
        "reduce_ready_partitions_and_remove_grads",
        "_release_ipg_buffers",
        "load_hp_checkpoint_state_from_checkpoint_dir",
        "update_lp_params",
    )
}
"""Methods of DeepSpeed whose inner working agsel depends on, besides those that the code names."""


class SelectiveZeroOptimizer(SelectiveStep, DeepSpeedZeroOptimizer):
    """DeepSpeed's ZeRO-1/2 optimizer that keeps gradients, steps and gathers for the selected blocks only."""

    ready_for_gradients: bool

    stock = DeepSpeedZeroOptimizer

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

        And let it all-reduce whole buckets in place, not slices of them: the same sums with less Python. So
        `reduce_scatter` of the configuration has no effect here, of which `guards.warn_of_ignored_settings` tells.
        """
        self.reduce_scatter = self.postscale_gradients = False
        self._being_reduced: torch.Tensor | None = None
        for group in self.bit16_groups:
            for parameter in group:
                del parameter._hp_mapping  # without it, DeepSpeed's `safe_get_full_...` return None

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

    def setup_buckets(self) -> None:
        """Stock allocates two buckets for gradients to be copied into."""
        if not self.ready_for_gradients:
            self.micro_step_id += 1
            self.ready_for_gradients = True

    def reduce_independent_p_g_buckets_and_remove_grads(self, param: Any, i: int) -> None:
        """Note a gradient. Stock copies each into a bucket and out again; here they are joined when it is full."""
        if param.numel() == 0 or not getattr(param, "ds_grad_is_ready", True):
            return
        param_id = self.get_param_id(param)
        if self.params_already_reduced[param_id]:
            raise RunError(
                "a gradient was computed twice in one backward: with gradient checkpointing set use_reentrant=False "
                "(gradient_checkpointing_kwargs)"
            )
        self.params_already_reduced[param_id] = True
        dtype = self.get_param_comm_dtype(param)
        bucket = self.ipg_buckets[dtype]
        if bucket.elements + param.numel() > self.reduce_bucket_size:
            self.reduce_ipg_grads(dtype)
        gradient = self.get_gradient_for_reduction(param)
        bucket.params.append((i, param.param_idx_in_group, param_id))
        bucket.grads.append(gradient)
        bucket.elements += param.numel()
        if gradient.is_cuda:
            bucket.copy_streams.add(torch.cuda.current_stream(gradient.device))

    def reduce_ipg_grads(self, comm_dtype: torch.dtype | None = None) -> None:
        """Reduce what has been noted, of one communication type or of all."""
        for dtype in [comm_dtype] if comm_dtype else sort_dtypes(self.ipg_buckets.keys()):
            if self.ipg_buckets[dtype].elements:
                self._reduce_bucket(self.ipg_buckets[dtype], dtype)

    def _reduce_bucket(self, bucket: Any, dtype: torch.dtype) -> None:
        """All-reduce the noted gradients as one; those that reach this rank's partitions get their result back."""
        several_streams = self._wait_for_producers(bucket)
        gradients = [gradient.view(-1) for gradient in bucket.grads]
        joined = gradients[0] if len(gradients) == 1 else torch.cat(gradients)
        if several_streams and self.overlap_comm:
            joined.record_stream(self.reduction_stream)
        self.average_tensor(joined, dtype)
        kept, results = [], []
        pieces = joined.split([gradient.numel() for gradient in gradients])
        for (group, index, param_id), gradient, piece in zip(bucket.params, gradients, pieces, strict=True):
            if self._use_compact_grad_partition_buffer(group) or not self.is_param_in_current_partition[param_id]:
                self.clear_grad_attribute(self.bit16_groups[group][index])
            else:
                kept.append(gradient)
                results.append(piece)
        if len(gradients) > 1 and kept:
            stream = self.reduction_stream if self.overlap_comm else get_accelerator().current_stream()
            with get_accelerator().stream(stream):
                torch._foreach_copy_(kept, results)
        bucket.clear()

    def _wait_for_producers(self, bucket: Any) -> bool:
        """Gradients of compiled layers may come on streams of their own (DeepSpeed issue 8061); whether they did."""
        if not bucket.copy_streams:  # no CUDA
            return False
        current = torch.cuda.current_stream(bucket.grads[0].device)
        others = bucket.copy_streams - {current}
        for stream in others:
            current.wait_stream(stream)
        for gradient in bucket.grads if others else ():
            gradient.record_stream(current)
        bucket.copy_streams.add(current)
        return bool(others)

    def average_tensor(self, tensor: torch.Tensor, communication_data_type: torch.dtype) -> None:
        """Keep what is being reduced until the next reduction: before that, the compute stream waits for this one."""
        previous, self._being_reduced = self._being_reduced, tensor
        super().average_tensor(tensor, communication_data_type)
        del previous

    def independent_gradient_partition_epilogue(self) -> None:
        """Stock waits for the last reduction here."""
        super().independent_gradient_partition_epilogue()
        self._being_reduced = None

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
        """Before a step's last micro-batch those accumulated in the type of the weights are in `all_grad_tensors`."""
        index = partition.index
        pieces = self.averaged_gradients.get(index)
        if pieces is None and self.all_grad_tensors.get(index):
            pieces = self.get_flat_partition(
                self.params_in_partition[index],
                self.first_offset[index],
                self.partition_size[index],
                dtype=self.gradient_accumulation_dtype,
                device=self.selection.residency.device,
                param_group_idx=index,
                return_tensor_list=True,
            )
        return list(pieces or [])

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
        self.write_elements(partitions)

    def write_elements(self, partitions: Iterable[Partition]) -> None:
        """Write the trained elements of these partitions, if there are any, into their weights."""
        for partition in partitions:
            self.elements.write(self.bit16_groups[partition.index])


def _is_frozen(parameters: Sequence[torch.nn.Parameter]) -> bool:
    return bool(parameters) and not any(parameter.requires_grad for parameter in parameters)
