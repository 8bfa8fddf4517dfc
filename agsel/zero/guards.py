"""What agsel refuses, each with one line that names the setting and the remedy."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Any

import torch
from deepspeed.runtime.engine import DeepSpeedEngine
from torch import nn

from agsel.adapters import has_scalable_adapters
from agsel.blocks import Block, decoder_layers
from agsel.elements import element_layers
from agsel.errors import UserError
from agsel.policies import Policy

logger = logging.getLogger("agsel")


def require_supported_engine(engine: Any) -> None:
    """Refuse engines and configurations under which block selection would be wrong or useless.

    Raises:
        UserError: naming the setting and what to use instead.
    """
    if isinstance(engine, DeepSpeedEngine) and "selection" in vars(engine):  # else the model would answer for it
        raise UserError("agsel.attach was called twice on one engine: keep the Selection it returned the first time")
    if type(engine) is not DeepSpeedEngine:
        raise UserError(
            f"{type(engine).__name__} is not supported: agsel needs the DeepSpeedEngine of deepspeed.initialize, "
            "without pipeline parallelism or the hybrid engine"
        )
    stage = engine.zero_optimization_stage()
    if stage not in (1, 2, 3):
        raise UserError(f"zero_optimization.stage is {int(stage)}: agsel needs 1, 2 or 3 (ds_configs/ has one of each)")
    refused = _refused_settings(engine)
    if refused:
        raise UserError(refused[0])


def warn_of_ignored_settings(engine: DeepSpeedEngine) -> None:
    """Name what the user has set and agsel overrides without harm."""
    zero = engine._config.zero_config
    is_set = "reduce_scatter" in zero.model_fields_set and zero.reduce_scatter
    if is_set and engine.zero_optimization_stage() < 3:
        logger.warning(
            "zero_optimization.reduce_scatter true has no effect at stages 1 and 2: agsel all-reduces whole buckets of "
            "gradients; remove it"
        )


def _refused_settings(engine: DeepSpeedEngine) -> list[str]:
    zero = engine._config.zero_config
    offload = zero.offload_optimizer
    checks = [
        (
            offload is not None and offload.super_offload,
            "zero_optimization.offload_optimizer.super_offload is not supported: remove offload_optimizer, agsel "
            "offloads the optimizer states itself (offload_states=True)",
        ),
        (
            zero.zenflow is not None,
            "zero_optimization.zenflow is not supported: remove it, agsel offloads the optimizer states itself",
        ),
        (
            _offloads(offload),
            "zero_optimization.offload_optimizer is not supported: remove it, agsel offloads the optimizer states of "
            "inactive blocks itself (offload_states=True)",
        ),
        (
            _offloads(zero.offload_param),
            "zero_optimization.offload_param is not supported: remove it, or use more GPUs with stage 3",
        ),
        (
            engine.zero_optimization_stage() == 3 and zero.module_granularity_threshold > 0,
            "zero_optimization.stage3_module_granularity_threshold is not supported: remove it, agsel gathers whole "
            "decoder layers itself",
        ),
        (
            engine.zero_allgather_sequential(),
            "zero_optimization.stage3_allgather_sequential is not supported: remove it, agsel gathers the weights of a "
            "decoder layer in one piece",
        ),
        (
            zero.round_robin_gradients,
            "zero_optimization.round_robin_gradients is not supported: remove it, it is for offload_optimizer, and "
            "another number of ranks would misread DeepSpeed's checkpoints",
        ),
        (
            zero.elastic_checkpoint,
            "zero_optimization.elastic_checkpoint is not supported: remove it, blocks have step counts of their own",
        ),
        (
            engine.load_universal_checkpoint(),
            "checkpoint.load_universal is not supported: remove it, load_checkpoint itself converts what another "
            "number of ranks saved",
        ),
        (
            engine.has_moe_layers,
            "DeepSpeed MoE layers (expert parallelism) are not supported: use a model without deepspeed.moe layers",
        ),
        (
            engine.mp_world_size > 1,
            "tensor (model) parallelism is not supported: set its size to 1 and use ZeRO-3 for large models",
        ),
        (engine.is_deepcompile_enabled(), "compile.deepcompile is not supported: set it to false"),
        (engine.torch_autocast_enabled(), "torch_autocast is not supported: use bf16 or fp16 instead"),
        (
            engine.bf16_master_weights_and_gradients() or engine.fp16_master_weights_and_gradients(),
            "16-bit master weights are not supported: remove *_master_weights_and_grads, agsel keeps them in fp32",
        ),
    ]
    return [message for refused, message in checks if refused]


def _offloads(config: Any) -> bool:
    return config is not None and config.device != "none"


def require_adapters(policy: Policy, model: nn.Module, blocks: Iterable[Block]) -> None:
    """Refuse a policy that scales adapters of layers, on a model that has a layer without, or on other blocks.

    Raises:
        UserError: so it is.
    """
    around = [block.name for block in blocks if not block.is_layer]
    if policy.needs_adapters and around:
        raise UserError(
            f"{type(policy).__name__} scales the adapters of decoder layers, and {around[0]} takes part: select among "
            "the layers (--select_blocks layers), or use another method (--method)"
        )
    if policy.needs_adapters and not all(map(has_scalable_adapters, decoder_layers(model))):
        raise UserError(
            f"{type(policy).__name__} trains LoRA or DoRA adapters, and a layer of the model has none: add them "
            "(--use_peft, --lora_target_modules all-linear), or use another method (--method)"
        )


def require_early_choice(engine: DeepSpeedEngine, policy: Policy) -> None:
    """Refuse to choose by the first micro-batch where it is the only one, is not reduced alone, or decides nothing.

    Raises:
        UserError: naming the setting.
    """
    if engine.gradient_accumulation_steps() == 1:
        raise UserError(
            "choose_early chooses by the first of several micro-batches, and gradient_accumulation_steps is 1: raise "
            "it, or leave out choose_early (--choose_early)"
        )
    if engine.zero_optimization_stage() == 1:
        raise UserError(
            "choose_early does not work at zero_optimization.stage 1, which reduces the gradients of all micro-batches "
            "at once: use stage 2 or 3 (--deepspeed zero2)"
        )
    if "explore" not in policy.kinds_of_steps:
        raise UserError(
            f"{type(policy).__name__} never chooses by gradients: leave out choose_early (--choose_early); a rule of "
            "your own that does must name `explore` in its kinds_of_steps"
        )


def require_plain_partitions(engine: DeepSpeedEngine) -> None:
    """Refuse trained elements where DeepSpeed keeps a second or a quantised form of the weights that hold them.

    Raises:
        UserError: naming the setting.
    """
    if engine.zero_optimization_stage() < 3 or not element_layers(engine.module):
        return
    zero = engine._config.zero_config
    forms = {
        "zero_hpz_partition_size": zero.zero_hpz_partition_size > 1,
        "zero_quantized_weights": zero.zero_quantized_weights,
        "zero_quantized_nontrainable_weights": zero.zero_quantized_nontrainable_weights,
    }
    for name in filter(forms.get, forms):
        raise UserError(f"zero_optimization.{name} does not work with trained elements: remove it, or use stage 2")


def require_policy(policy: Any) -> None:
    """Refuse what is no policy: most often its class, or the name of its method.

    Raises:
        UserError: naming what to pass.
    """
    if not isinstance(policy, Policy):
        given = policy.__name__ if isinstance(policy, type) else repr(policy)
        raise UserError(
            f"policy must be a policy such as agsel.AdaGradSelect(fraction=0.3, explore_steps=500), got {given}"
        )


def require_supported_optimizer(optimizer: Any, stock: Any) -> None:
    """Refuse another ZeRO optimizer than the stock class of the stage, and client optimizers other than Adam.

    Raises:
        UserError: naming the setting and what to use instead.
    """
    if type(optimizer) is not stock:
        raise UserError(
            f"{type(optimizer).__name__} is not supported: use ZeRO stage 2 or leave data_types.grad_accum_dtype unset "
            "(with bf16 at stage 1 an fp32 grad_accum_dtype makes DeepSpeed build BF16_Optimizer)"
        )
    client = optimizer.optimizer
    adam_like = isinstance(client, torch.optim.Adam) or type(client).__name__ == "FusedAdam"
    if not adam_like or any(group.get("amsgrad") for group in client.param_groups):
        raise UserError(
            f"optimizer {type(client).__name__} is not supported: pass torch.optim.AdamW (without amsgrad) over "
            "agsel.block_param_groups(model) to deepspeed.initialize"
        )


def require_whole_groups(optimizer: Any, partitioned: set[int]) -> None:
    """Refuse an optimizer with a param group that ZeRO made no partition of, because all of it was frozen.

    Raises:
        UserError: naming the group and the remedy.
    """
    dropped = set(range(len(optimizer.optimizer.param_groups))) - partitioned
    if dropped:
        raise UserError(
            f"optimizer param group {min(dropped)} was frozen at deepspeed.initialize, so ZeRO dropped it: leave every "
            "block of agsel.block_param_groups(model) trainable, agsel freezes what is not selected"
        )
