"""Whether a run of `launch/train.py` fits its GPUs and its host, asked before it starts."""

from __future__ import annotations

import math
import os
from dataclasses import replace

import torch
from datasets import Dataset
from torch import nn
from transformers import Trainer
from trl import SFTConfig

from agsel.elements.choosing import candidates, linear_weights
from agsel.errors import UserError
from agsel.planning.description import describe_memory
from agsel.planning.memory import MemoryPlan, Planner, meta_copy, on_gpu, planned_steps
from agsel.planning.rehearsal import CannotRehearseError, Rehearsal, Step, Workload, ZeroSettings
from agsel.planning.rehearsal.workload import Loss
from agsel.policies import Policy, fraction_of_blocks, reads_fraction
from agsel.training.configuration import Configuration, smooths_labels
from agsel.zero.host_memory import available_bytes


def plan_of_run(configuration: Configuration, trainer: Trainer, policy: Policy) -> tuple[str, str | None]:
    """What a run needs at most, as text, and one line on what it lacks, if anything. On the CPU only the host's part.

    A model that cannot be rehearsed is no reason to stop: then the text says so.
    """
    try:
        return _plan_of_run(configuration, trainer, policy)
    except CannotRehearseError as error:
        return f"memory    cannot be planned for this model: {error}", None
    finally:
        if configuration.selection.compile_layers:
            torch._dynamo.reset()  # the rehearsal's graphs are of no use to the run


def _plan_of_run(configuration: Configuration, trainer: Trainer, policy: Policy) -> tuple[str, str | None]:
    training, selection = configuration.training, configuration.selection
    planner = Planner(
        meta_copy(trainer.model, _dtype(training)),
        _workload(configuration, trainer),
        blocks=configuration.taking_part,
        select_from=selection.select_from,
        offload_states=selection.offload_states,
        policy=policy,
        fold_adapters=selection.fold_adapters,
        ranks_per_host=int(os.environ["LOCAL_WORLD_SIZE"]),
    )
    kinds = () if training.use_cpu else planned_steps(policy)
    plan = planner.plan(policy.started(planner.infos).blocks_per_step, kinds)
    host = available_bytes() + _weights_on_host(trainer.model) * plan.ranks_per_host
    gpu = 0 if training.use_cpu else torch.cuda.get_device_properties(training.device).total_memory
    return describe_memory(plan), shortage(planner, plan, gpu, host, all_blocks=not reads_fraction(policy))


def require_room_for_choosing(configuration: Configuration, trainer: Trainer) -> str | None:
    """One line on the memory that choosing elements takes at most; None on the CPU, and where it cannot be planned.

    Raises:
        UserError: a GPU has less, and the run is not forced.
    """
    training, method = configuration.training, configuration.elements.elements
    if training.use_cpu or method is None:
        return None
    try:
        peak = _peak_of_choosing(configuration, trainer, method)
    except CannotRehearseError as error:
        return f"memory    choosing elements cannot be planned for this model: {error}"
    needed, gpu = on_gpu(peak), torch.cuda.get_device_properties(training.device).total_memory
    if needed > gpu and not configuration.selection.force:
        raise UserError(
            f"choosing elements needs {needed / 1e9:.1f} GB on each GPU, with CUDA, NCCL and gaps, which has "
            f"{gpu / 1e9:.1f} GB: use a smaller --per_device_train_batch_size or --max_length, "
            "--gradient_checkpointing true, or more GPUs; --force true starts all the same"
        )
    return f"memory    choosing elements takes {peak / 1e9:.2f} GB on each GPU, at most"


def _peak_of_choosing(configuration: Configuration, trainer: Trainer, method: str) -> int:
    model = meta_copy(trainer.model, _dtype(configuration.training))
    blocks = configuration.blocks_of(model)
    groups = [list(candidates(layer, method).values()) for layer in linear_weights(model, blocks)]
    workload = replace(_workload(configuration, trainer), accumulation=1, compiled=False)
    nothing = frozenset[int]()
    everything = frozenset(index for index, group in enumerate(groups) if group)
    step = Step(groups=groups, trainable=everything, updated=nothing, resident=nothing, choosing=True)
    return Rehearsal(model, workload).run(step).total


def shortage(planner: Planner, plan: MemoryPlan, gpu: int, host: int, *, all_blocks: bool = False) -> str | None:
    """One line on what a run lacks and what would fit, None if it fits.

    Args:
        planner: that made the plan.
        plan: of the run.
        gpu: bytes of each GPU.
        host: bytes free on this host.
        all_blocks: the method updates all of them, whatever the fraction.
    """
    if plan.host_needed > host:
        return (
            f"the optimizer states need {plan.host_needed / 1e9:.1f} GB of host memory, {host / 1e9:.1f} GB are free: "
            "use more hosts, or keep them on the GPUs (--offload_states false)"
        )
    if not plan.steps or plan.gpu_needed <= gpu:
        return None
    count = 0 if all_blocks else planner.most_blocks(gpu, tuple(plan.steps))
    smaller = f"--select_fraction {fraction_of_blocks(count, planner.number_of_blocks)}, a " if count else "a "
    return (
        f"the run needs {plan.gpu_needed / 1e9:.1f} GB on each GPU, with CUDA, NCCL and gaps, which has "
        f"{gpu / 1e9:.1f} GB: use {smaller}smaller --per_device_train_batch_size or --max_length, "
        "--gradient_checkpointing true, or more GPUs with ZeRO-3"
    )


def _weights_on_host(model: nn.Module) -> int:
    """Bytes that are given up before the optimizer states take their place."""
    return sum(parameter.nbytes for parameter in model.parameters() if parameter.device.type == "cpu")


def _dtype(training: SFTConfig) -> torch.dtype:
    return torch.bfloat16 if training.bf16 else torch.float16 if training.fp16 else torch.float32


def _workload(configuration: Configuration, trainer: Trainer) -> Workload:
    training = configuration.training
    unpadded = training.packing or training.padding_free or training.per_device_train_batch_size == 1
    return Workload(
        zero=ZeroSettings.of(training.hf_deepspeed_config.config["zero_optimization"]),
        ranks=training.world_size,
        micro_batch=training.per_device_train_batch_size,
        sequence=_longest_row(training, trainer.train_dataset),
        accumulation=training.gradient_accumulation_steps,
        checkpointing=training.gradient_checkpointing,
        padded=not unpadded,
        compiled=configuration.selection.compile_layers,
        liger_layers=training.use_liger_kernel,
        loss=_loss(training),
    )


def _loss(training: SFTConfig) -> Loss:
    """TRL's losses are fused, unless it smooths the labels."""
    return "transformers" if smooths_labels(training) else "trl"


def _longest_row(training: SFTConfig, rows: Dataset) -> int:
    """Tokens of the longest row as the collator makes it, without reading the rows one by one: datasets are large."""
    chunks = rows.data.column("input_ids").chunks
    longest = int(max(chunk.value_lengths().to_numpy().max() for chunk in chunks if len(chunk)))
    multiple = training.pad_to_multiple_of or 1
    return math.ceil(min(longest, training.max_length or longest) / multiple) * multiple
