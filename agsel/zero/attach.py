"""`agsel.attach`: turn a DeepSpeed ZeRO engine into one that trains only the selected blocks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from deepspeed.runtime.engine import DeepSpeedEngine
from torch import nn
from torch.utils.hooks import RemovableHandle

from agsel.blocks import Block, decoder_layers, find_blocks
from agsel.policies import Policy
from agsel.zero import guards
from agsel.zero.consensus import require_equal_settings
from agsel.zero.engine import SelectiveEngine
from agsel.zero.host_memory import require_host_memory
from agsel.zero.residency import Partition, Residency
from agsel.zero.sanity import SanityChecks
from agsel.zero.selection import Moment, Selection
from agsel.zero.stage_1_and_2 import SelectiveZeroOptimizer
from agsel.zero.stage_3 import SelectiveZeroOptimizerStage3

SELECTIVE_CLASSES: dict[int, type[SelectiveZeroOptimizer] | type[SelectiveZeroOptimizerStage3]] = {
    1: SelectiveZeroOptimizer,
    2: SelectiveZeroOptimizer,
    3: SelectiveZeroOptimizerStage3,
}


def attach(
    engine: DeepSpeedEngine,
    policy: Policy,
    *,
    offload_states: bool = True,
    pin_memory: bool = True,
    max_skipped_steps: int = 50,
    sanity_checks: int = 0,
) -> Selection:
    """Train only the blocks that `policy` selects. The training loop stays as it is.

    Call it once, right after `deepspeed.initialize`, on every rank. The engine and its ZeRO optimizer become instances
    of subclasses of their classes; nothing of DeepSpeed is patched. At stage 3 its hooks on the model are registered
    again, one set for each decoder layer instead of one for every module inside.

    Args:
        engine: of ZeRO stage 1, 2 or 3, with a client Adam or AdamW built from `agsel.block_param_groups(model)`.
        policy: who is updated next; equal on all ranks.
        offload_states: keep the optimizer partitions of blocks that are not selected in host memory.
        pin_memory: page-lock that memory; without, copies are slower and the training waits for them.
        max_skipped_steps: stop the run after this many steps in a row with a non-finite gradient.
        sanity_checks: check weights and states every so many steps, see `agsel.zero.sanity`; 0 never checks.

    Returns:
        The selection: `blocks`, `last`, `counts`, `resident`.

    Raises:
        ValueError: the engine's configuration, optimizer or model does not fit, `policy` is none, or not equal on all
            ranks, or the host has too little memory.
        RuntimeError: this DeepSpeed differs from the tested one where agsel overrides it.
    """
    guards.require_policy(policy)
    guards.require_supported_engine(engine)
    optimizer: Any = engine.optimizer
    selective_class = SELECTIVE_CLASSES[engine.zero_optimization_stage()]
    guards.require_supported_optimizer(optimizer, selective_class.stock)
    guards.require_tested_deepspeed(SelectiveEngine.relies_on | selective_class.relies_on)
    guards.require_whole_groups(optimizer, selective_class.partitioned_groups(optimizer))
    masters = selective_class.masters(optimizer)
    blocks, block_indices = _match_blocks(
        engine.module, [selective_class.parameters_of_partition(optimizer, index) for index in range(len(masters))]
    )
    settings = {
        "blocks": [block.name for block in blocks],
        "offload_states": offload_states,
        "pin_memory": pin_memory,
        "max_skipped_steps": max_skipped_steps,
        "sanity_checks": sanity_checks,
        "gradient_clipping": engine.gradient_clipping(),
        "optimizer": str(optimizer.optimizer.defaults),
    }
    require_equal_settings(policy.settings() | settings, optimizer.dp_process_group)

    partitions = [
        Partition(index, block, master, optimizer.optimizer)
        for index, (block, master) in enumerate(zip(block_indices, masters, strict=True))
    ]
    if offload_states:
        require_host_memory(sum(p.shape.numel() * p.master.itemsize for p in partitions), optimizer.dp_process_group)
    residency = Residency(partitions, torch.device(engine.device), offload_states, pin_memory)
    group = optimizer.dp_process_group
    sanity = None
    if sanity_checks:
        names = [block.name for block in blocks]
        sanity = SanityChecks(sanity_checks, find_blocks(engine.module), residency, names, group)
    selection = Selection(blocks, policy, residency, group, max_skipped_steps, sanity)
    optimizer.__class__ = selective_class
    optimizer.selection = selection
    optimizer.prepare_selection()
    engine.__class__ = SelectiveEngine
    engine.selection = selection
    selection.adopt_states()
    _move_states_while_computing(engine, selection, blocks)
    selection.plan_step()
    return selection


def _move_states_while_computing(engine: Any, selection: Selection, blocks: Sequence[Block]) -> None:
    """Tell the selection how far a step has come, so that states travel beside it.

    It begins at the first layer: models read a value from the device while they make the attention mask, which would
    queue behind the copies. `SelectiveStep.backward_prologue` comes in for a backward that leaves no layer, and after a
    third of the backward freed activations leave room for the states that are still missing.
    """

    def on_gradient(_: nn.Parameter) -> None:
        if engine.is_gradient_accumulation_boundary():
            selection.move_states(Moment.LATE_BACKWARD)

    lower_blocks = blocks[: len(blocks) * 2 // 3 + 1]  # which of them get a gradient differs from step to step
    engine.hooks = [block.trainable[0].register_post_accumulate_grad_hook(on_gradient) for block in lower_blocks]
    layers = decoder_layers(engine.module)
    for index, layer in enumerate(layers):

        def on_entry(
            _: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any], remaining: int = len(layers) - index
        ) -> None:
            selection.enter_layer(hidden_states(*arguments, *keywords.values()), remaining)

        engine.hooks.append(layer.register_forward_pre_hook(on_entry, with_kwargs=True))
    if isinstance(engine.optimizer, SelectiveZeroOptimizerStage3):
        engine.hooks.append(_reach_first_layer_while_recording(engine))


def hidden_states(*arguments: Any) -> torch.Tensor | None:
    """Among what a layer is called with, the first tensor of floating-point numbers."""
    return next((value for value in arguments if torch.is_tensor(value) and value.is_floating_point()), None)


def _reach_first_layer_while_recording(engine: Any) -> RemovableHandle:
    """Let the backward that ZeRO-3 records, to gather weights ahead of time by it, go down to the first layer.

    DeepSpeed accepts a shorter backward than the recorded one, but forgets the record at a longer one: with frozen
    layers at the bottom, prefetching would stop for two steps whenever a lower layer is selected than ever before.
    DeepSpeed gives back the weights of a layer by the gradients of its positional arguments.
    """

    def on_forward(_: nn.Module, arguments: tuple[Any, ...]) -> None:
        hidden = hidden_states(*arguments)
        if hidden is None:
            raise ValueError(
                "a model that calls its layers by keyword is not supported at zero_optimization.stage 3: use stage 2, "
                "or let it call layer(hidden_states, ...)"
            )
        if torch.is_grad_enabled() and engine.optimizer.is_recording_modules:
            hidden.requires_grad_()

    return decoder_layers(engine.module)[0].register_forward_pre_hook(on_forward)


def _match_blocks(
    model: nn.Module, parameters_of_partitions: Sequence[Sequence[nn.Parameter]]
) -> tuple[list[Block], list[int]]:
    """The blocks that take part, and for each ZeRO partition the index of its block.

    Raises:
        ValueError: a partition is not of one block, or a trainable parameter is in none.
    """
    found = find_blocks(model)
    name_of = {id(parameter): block.name for block in found for parameter in block.parameters}
    names_of_partitions = []
    for index, parameters in enumerate(parameters_of_partitions):
        names = sorted({name_of.get(id(parameter), "a parameter in no block") for parameter in parameters})
        if len(names) != 1:
            raise ValueError(
                f"optimizer param group {index} holds {', '.join(names[:3])}: it must hold one block; "
                "build the optimizer from agsel.block_param_groups(model)"
            )
        names_of_partitions += names
    owned = {id(parameter) for parameters in parameters_of_partitions for parameter in parameters}
    left_out = [name for name, p in model.named_parameters() if p.requires_grad and id(p) not in owned]
    if left_out:
        raise ValueError(
            f"{len(left_out)} trainable parameters are in no optimizer param group ({left_out[0]} ...): "
            "build the optimizer from agsel.block_param_groups(model)"
        )
    blocks = [block for block in found if block.name in names_of_partitions]
    index_of = {block.name: index for index, block in enumerate(blocks)}
    return blocks, [index_of[name] for name in names_of_partitions]
