"""`agsel.attach`: turn a DeepSpeed ZeRO engine into one that trains only the selected blocks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from deepspeed.runtime.engine import DeepSpeedEngine
from torch import nn

from agsel import upstream
from agsel.adapters import fuse_adapters
from agsel.blocks import Block, decoder_layers, find_blocks
from agsel.errors import UserError
from agsel.policies import Policy
from agsel.recomputation import recompute_inputs
from agsel.zero import guards, universal
from agsel.zero.consensus import require_equal_settings
from agsel.zero.engine import SelectiveEngine
from agsel.zero.host_memory import require_host_memory
from agsel.zero.parameters import block_infos
from agsel.zero.residency import Partition, Residency
from agsel.zero.sanity import SanityChecks
from agsel.zero.selection import Selection
from agsel.zero.stage_1_and_2 import SelectiveZeroOptimizer
from agsel.zero.stage_3 import SelectiveZeroOptimizerStage3
from agsel.zero.write_through import WriteThrough, describe_elements

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
    fold_adapters: bool = False,
    choose_early: bool = False,
) -> Selection:
    """Train only the blocks that `policy` selects. The training loop stays as it is.

    Call it once, right after `deepspeed.initialize`, on every rank. The engine and its ZeRO optimizer become instances
    of subclasses of their classes, as do PEFT's linear layers with LoRA adapters; nothing is patched. At stage 3
    DeepSpeed's hooks on the model are registered again, one set for each decoder layer instead of one for every module
    inside.

    Args:
        engine: of ZeRO stage 1, 2 or 3, with a client Adam or AdamW built from `agsel.block_param_groups(model)`.
        policy: who is updated next; equal on all ranks.
        offload_states: keep the optimizer partitions of blocks that are not selected in host memory.
        pin_memory: page-lock that memory; without, copies are slower and the training waits for them.
        max_skipped_steps: stop the run after this many steps in a row with a non-finite gradient.
        sanity_checks: check weights and states every so many steps, see `agsel.zero.sanity`; 0 never checks.
        fold_adapters: compute with LoRA adapters added to their weights for the moment, see `agsel.low_rank`.
        choose_early: let a step that explores choose by the gradients of its first micro-batch, of several: the others
            cost what those of exploiting steps do, and norms of blocks left out are not known. At stages 2 and 3.

    Returns:
        The selection: `blocks`, `last`, `counts`, `resident`.

    Raises:
        UserError: the engine's configuration, optimizer or model does not fit, `policy` is none, or not equal on all
            ranks, or the host has too little memory.
        RunError: this DeepSpeed differs from the tested one where agsel overrides it.
    """
    guards.require_policy(policy)
    guards.require_supported_engine(engine)
    optimizer: Any = engine.optimizer
    selective_class = SELECTIVE_CLASSES[engine.zero_optimization_stage()]
    guards.require_supported_optimizer(optimizer, selective_class.stock)
    upstream.require_tested(*_modules_behind(selective_class))
    guards.require_whole_groups(optimizer, selective_class.partitioned_groups(optimizer))
    guards.warn_of_ignored_settings(engine)
    masters = selective_class.masters(optimizer)
    blocks, block_indices = _match_blocks(
        engine.module, [selective_class.parameters_of_partition(optimizer, index) for index in range(len(masters))]
    )
    elements = describe_elements(engine.module)
    settings = {
        "blocks": [block.name for block in blocks],
        "offload_states": offload_states,
        "pin_memory": pin_memory,
        "max_skipped_steps": max_skipped_steps,
        "sanity_checks": sanity_checks,
        "fold_adapters": fold_adapters,
        "choose_early": choose_early,
        "gradient_clipping": engine.gradient_clipping(),
        "optimizer": str(optimizer.optimizer.defaults),
        "trained elements": elements,
    }
    if choose_early:
        guards.require_early_choice(engine, policy)
    guards.require_adapters(policy, engine.module, blocks)
    guards.require_plain_partitions(engine)
    group = optimizer.dp_process_group
    require_equal_settings(policy.settings() | settings, group)
    policy.start(block_infos(blocks))

    partitions = [
        Partition(index, block, master, optimizer.optimizer, keeps_moments=policy.keeps_moments)
        for index, (block, master) in enumerate(zip(block_indices, masters, strict=True))
    ]
    if offload_states:
        movable = [partition for partition in partitions if partition.block not in policy.pinned]
        require_host_memory(sum(p.home_shape.numel() * p.master.itemsize for p in movable), group)
    residency = Residency(partitions, torch.device(engine.device), offload_states, pin_memory, policy.pinned)
    sanity = None
    if sanity_checks:
        names = [block.name for block in blocks]
        sanity = SanityChecks(sanity_checks, find_blocks(engine.module), residency, names, group)
    selection = Selection(blocks, policy, residency, group, max_skipped_steps, sanity, elements)
    optimizer.__class__ = selective_class
    optimizer.selection = selection
    optimizer.elements = WriteThrough(engine.module)
    optimizer.chooses_early = choose_early
    optimizer.prepare_selection()
    fuse_adapters(decoder_layers(engine.module), fold=fold_adapters)
    engine.__class__ = SelectiveEngine
    engine.selection = selection
    selection.adopt_states()
    engine.hooks = selection.timetable.watch(engine, blocks) + optimizer.watch(engine)
    engine.hooks += recompute_inputs(decoder_layers(engine.module))
    selection.plan_step()
    return selection


def _modules_behind(selective_class: type) -> list[str]:
    """Those of this package: all but the optimizers of other stages and the conversion, which sees to itself."""
    others = {universal.__name__, *(each.__module__ for each in SELECTIVE_CLASSES.values())}
    others.remove(selective_class.__module__)
    modules = upstream.table()["checksums"]
    return [module for module in modules if module.startswith(f"{__package__}.") and module not in others]


def _match_blocks(
    model: nn.Module, parameters_of_partitions: Sequence[Sequence[nn.Parameter]]
) -> tuple[list[Block], list[int]]:
    """The blocks that take part, and for each ZeRO partition the index of its block.

    Raises:
        UserError: a partition is not of one block, or a trainable parameter is in none.
    """
    found = find_blocks(model)
    name_of = {id(parameter): block.name for block in found for parameter in block.parameters}
    names_of_partitions = []
    for index, parameters in enumerate(parameters_of_partitions):
        names = sorted({name_of.get(id(parameter), "a parameter in no block") for parameter in parameters})
        if len(names) != 1:
            raise UserError(
                f"optimizer param group {index} holds {', '.join(names[:3])}: it must hold one block; "
                "build the optimizer from agsel.block_param_groups(model)"
            )
        names_of_partitions += names
    owned = {id(parameter) for parameters in parameters_of_partitions for parameter in parameters}
    left_out = [name for name, p in model.named_parameters() if p.requires_grad and id(p) not in owned]
    if left_out:
        raise UserError(
            f"{len(left_out)} trainable parameters are in no optimizer param group ({left_out[0]} ...): "
            "build the optimizer from agsel.block_param_groups(model)"
        )
    blocks = [block for block in found if block.name in names_of_partitions]
    index_of = {block.name: index for index, block in enumerate(blocks)}
    return blocks, [index_of[name] for name in names_of_partitions]
