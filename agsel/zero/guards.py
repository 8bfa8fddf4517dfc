"""What agsel refuses, each with one line that names the setting and the remedy; and the check of DeepSpeed's insides.

agsel overrides private methods of DeepSpeed. `TESTED` holds a checksum of the source of each method it depends on, so a
DeepSpeed that changed one of them is refused by name instead of training wrongly.
"""

from __future__ import annotations

import ast
import inspect
import os
import textwrap
import warnings
import zlib
from collections.abc import Mapping
from typing import Any

import deepspeed
import torch
from deepspeed.runtime.engine import DeepSpeedEngine

from agsel.errors import RunError, UserError
from agsel.policies import Policy

ALLOW_UNTESTED = "AGSEL_ALLOW_UNTESTED"

TESTED = {
    "DeepSpeedEngine.destroy": 0xB778EB76,
    "DeepSpeedEngine.forward": 0xA737F79B,
    "DeepSpeedEngine.save_checkpoint": 0x3F1D5691,
    "DeepSpeedEngine.load_checkpoint": 0xFF67C709,
    "DeepSpeedEngine.load_universal_checkpoint": 0x210A5679,
    "DeepSpeedEngine.load_module_state_dict": 0xCB78FFCD,
    "DeepSpeedEngine._load_checkpoint": 0x4DEDF69E,
    "DeepSpeedEngine._load_zero_checkpoint": 0x127A7F3F,
    "DeepSpeedEngine._get_ckpt_name": 0x10B029FD,
    "DeepSpeedEngine._take_model_step": 0x006D0E3E,
    "DeepSpeedEngine._backward_prologue": 0x0542874F,
    "DeepSpeedEngine._backward_epilogue": 0x1F893CA0,
    "DeepSpeedZeroOptimizer.initialize_optimizer_states": 0xB691B59D,
    "DeepSpeedZeroOptimizer.backward_prologue": 0xAA3CA6E3,
    "DeepSpeedZeroOptimizer.offload_states": 0xF5B54D9E,
    "DeepSpeedZeroOptimizer.refresh_fp32_params": 0x2CED767E,
    "DeepSpeedZeroOptimizer._restore_from_bit16_weights": 0x4CF5155F,
    "DeepSpeedZeroOptimizer.step": 0x086E88EE,
    "DeepSpeedZeroOptimizer._optimizer_step": 0x9B7D498D,
    "DeepSpeedZeroOptimizer._lazy_init_hp_params_optimizer_state": 0x6E47613D,
    "DeepSpeedZeroOptimizer.independent_gradient_partition_epilogue": 0xD9823F3F,
    "DeepSpeedZeroOptimizer.get_all_grad_tensors": 0x81847040,
    "DeepSpeedZeroOptimizer.get_flat_partition": 0x383C9AFC,
    "DeepSpeedZeroOptimizer._build_compact_grad_partition_buffer": 0xA93EA890,
    "DeepSpeedZeroOptimizer.reduce_independent_p_g_buckets_and_remove_grads": 0x4BD85ADD,
    "DeepSpeedZeroOptimizer.reduce_ipg_grads": 0xA0E04AC1,
    "DeepSpeedZeroOptimizer.average_tensor": 0x131E063B,
    "DeepSpeedZeroOptimizer.gradient_reduction_w_predivide": 0x634331A9,
    "DeepSpeedZeroOptimizer._add_full_reduction_to_compact_grad_partition": 0xAC009C6D,
    "DeepSpeedZeroOptimizer.get_gradient_for_reduction": 0xE87F068D,
    "DeepSpeedZeroOptimizer.clear_grad_attribute": 0xC48D380E,
    "DeepSpeedZeroOptimizer.process_gradients": 0x708E6EA3,
    "DeepSpeedZeroOptimizer.reduce_ready_partitions_and_remove_grads": 0x2E805B77,
    "DeepSpeedZeroOptimizer.setup_buckets": 0xEED82ADF,
    "DeepSpeedZeroOptimizer._release_ipg_buffers": 0x66D9EF20,
    "DeepSpeedZeroOptimizer._use_compact_grad_partition_buffer": 0x1D874859,
    "DeepSpeedZeroOptimizer.free_grad_in_param_list": 0x1BCBA6C4,
    "DeepSpeedZeroOptimizer._load_universal_checkpoint": 0x6EA8A08B,
    "DeepSpeedZeroOptimizer._link_all_hp_params": 0xAF0C8E58,
    "DeepSpeedZeroOptimizer.load_hp_checkpoint_state_from_checkpoint_dir": 0x0DCBB95F,
    "DeepSpeedZeroOptimizer.update_lp_params": 0x54C1C5B3,
    "DeepSpeedZeroOptimizer_Stage3.destroy": 0xA188F91C,
    "DeepSpeedZeroOptimizer_Stage3.offload_states": 0xFE9711DE,
    "DeepSpeedZeroOptimizer_Stage3.refresh_fp32_params": 0x2CED767E,
    "DeepSpeedZeroOptimizer_Stage3._restore_from_bit16_weights": 0xF891E24E,
    "DeepSpeedZeroOptimizer_Stage3.backward_prologue": 0xACE31475,
    "DeepSpeedZeroOptimizer_Stage3.step": 0x81FB8604,
    "DeepSpeedZeroOptimizer_Stage3._optimizer_step": 0x2739695A,
    "DeepSpeedZeroOptimizer_Stage3._pre_step": 0xB0AA567F,
    "DeepSpeedZeroOptimizer_Stage3._post_step": 0x146AB3AE,
    "DeepSpeedZeroOptimizer_Stage3._partition_all_parameters": 0xD6CE801B,
    "DeepSpeedZeroOptimizer_Stage3._reassign_or_swap_out_partitioned_parameters": 0xEF8A238A,
    "DeepSpeedZeroOptimizer_Stage3._setup_for_real_optimizer": 0xA83A933B,
    "DeepSpeedZeroOptimizer_Stage3.create_reduce_and_remove_grad_hooks": 0xE34B86D9,
    "DeepSpeedZeroOptimizer_Stage3.reduce_ready_partitions_and_remove_grads": 0xF97B18B0,
    "DeepSpeedZeroOptimizer_Stage3.independent_gradient_partition_epilogue": 0x0A9EB0D8,
    "DeepSpeedZeroOptimizer_Stage3.partition_grads": 0xE5111B90,
    "DeepSpeedZeroOptimizer_Stage3._get_param_coordinator": 0xB35D8F68,
    "DeepSpeedZeroOptimizer_Stage3._get_fp32_opt_state_partition": 0xEBB30447,
    "DeepSpeedZeroOptimizer_Stage3._load_universal_checkpoint": 0xABF9D6B3,
    "DeepSpeedZeroOptimizer_Stage3.load_hp_checkpoint_state_from_checkpoint_dir_stage3": 0xCCE89D9C,
    "DeepSpeedZeroOptimizer_Stage3.load_module_checkpoint_state_from_checkpoint_dir_stage3": 0x6F7C3126,
    "DeepSpeedZeroOptimizer_Stage3.load_hp_checkpoint_state": 0xD480731C,
    "DeepSpeedZeroOptimizer_Stage3.checkpoint_event_prologue": 0x74182312,
    "DeepSpeedZeroOptimizer_Stage3.checkpoint_event_epilogue": 0xD7CFD151,
    "DeepSpeedZeRoOffload.setup_zero_stage3_hooks": 0x3EEBD365,
    "DeepSpeedZeRoOffload._remove_module_hooks": 0x99A8356C,
    "DeepSpeedZeRoOffload._register_deepspeed_module": 0x4830E99F,
    "PartitionedParameterCoordinator.reset_step": 0x34CC225B,
    "PartitionedParameterCoordinator._invalidate_trace": 0x476334FB,
    "PartitionedParameterCoordinator._clean_inflight_param_registry": 0x1022FAD8,
    "PartitionedParameterCoordinator._fetch_sub_module_impl": 0xFD5C020F,
    "PartitionedParameterCoordinator.__all_gather_params": 0x714DECC0,
    "PartitionedParameterCoordinator.__all_gather_params_": 0xBFA8CF20,
    "PartitionedParameterCoordinator.release_sub_module": 0xD2801082,
    "PartitionedParameterCoordinator.release_and_reset_all": 0xA725F5AA,
    "InflightParamRegistry.__setitem__": 0x966EC535,
    "Init._convert_to_deepspeed_param": 0x5C13F253,
    "Init._all_gather": 0x20324242,
    "Init._partition_param": 0xE5E4CDB0,
    "deepspeed.checkpoint.ds_to_universal.main": 0xD18BC37C,
    "deepspeed.checkpoint.ds_to_universal.extract_zero_shards": 0x72705BEB,
    "deepspeed.checkpoint.ds_to_universal.extract_zero_shards_stage3": 0xC29A736A,
    "deepspeed.checkpoint.ds_to_universal.dump_param_fragment": 0x6C016AA3,
    "deepspeed.checkpoint.ds_to_universal.merge_tp_slices": 0x9BCE6A6E,
    "deepspeed.checkpoint.ds_to_universal.merge_zero3_slices": 0x67EF07A9,
    "deepspeed.checkpoint.ds_to_universal._merge_zero_shards": 0x2949D1B4,
    "deepspeed.checkpoint.ds_to_universal._inject_missing_state": 0x3687694F,
    "deepspeed.checkpoint.ds_to_universal._do_parallel_work": 0xB55C590F,
    "deepspeed.checkpoint.ds_to_universal._save_optimizer_state": 0xC227C17B,
    "deepspeed.checkpoint.ds_to_universal._save_optimizer_state_stage3": 0x5EDAD8D9,
    "deepspeed.checkpoint.universal_checkpoint.load_hp_checkpoint_state": 0xC925DB27,
}
"""Of DeepSpeed 0.19.8. For another version: `checksums` of all that `SelectiveEngine` and the `SELECTIVE_CLASSES` in
attach.py rely on, and of `RELIES_ON` in universal.py."""


def require_supported_engine(engine: Any) -> None:
    """Refuse engines and configurations under which block selection would be wrong or useless.

    Raises:
        UserError: naming the setting and what to use instead.
    """
    if hasattr(engine, "selection"):
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


def _refused_settings(engine: Any) -> list[str]:
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


def require_tested_deepspeed(relies_on: Mapping[Any, tuple[str, ...]]) -> None:
    """Compare methods of DeepSpeed's classes, or functions of its modules, with the tested ones.

    Raises:
        RunError: one is gone or its source differs; only a warning if AGSEL_ALLOW_UNTESTED=1.
    """
    changed = [name for name, checksum in checksums(relies_on).items() if TESTED[name] != checksum]
    if not changed:
        return
    message = (
        f"DeepSpeed {deepspeed.__version__} differs from the tested 0.19.8 in {', '.join(changed)}: install "
        f"deepspeed==0.19.8, or set {ALLOW_UNTESTED}=1 after running agsel's tests with yours"
    )
    if os.environ.get(ALLOW_UNTESTED) != "1":
        raise RunError(message)
    warnings.warn(message, stacklevel=3)


def checksums(relies_on: Mapping[Any, tuple[str, ...]]) -> dict[str, int]:
    """CRC-32 of the source of methods of classes, or of functions of modules; 0 where there is none.

    Read from the source text: DeepSpeed's profiling decorator hides the methods from `inspect.getsource`.
    """
    found: dict[str, int] = {}
    for stock, names in relies_on.items():
        texts: dict[str, str] = {}
        classes = [base for base in reversed(getattr(stock, "__mro__", ())) if base.__module__.startswith("deepspeed.")]
        for owner in classes or [stock]:
            texts |= _functions(owner)
        found |= {f"{stock.__name__}.{name}": zlib.crc32(texts.get(name, "").encode()) for name in names}
    return found


def _functions(owner: Any) -> dict[str, str]:
    """The source of every function in the body of a class or module."""
    source = textwrap.dedent(inspect.getsource(owner))
    lines, tree = source.splitlines(), ast.parse(source)
    body = tree.body if inspect.ismodule(owner) else tree.body[0].body  # type: ignore[attr-defined]
    return {
        node.name: "\n".join(lines[node.lineno - 1 : node.end_lineno])
        for node in body
        if isinstance(node, ast.FunctionDef)
    }
