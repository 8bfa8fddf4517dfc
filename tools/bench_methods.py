"""The methods that tools/bench.py compares: a model with random weights and the engine that trains it.

Each starts with the same model, kernels and DeepSpeed settings; `METHODS` names them.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import deepspeed
import torch
from bench import REPOSITORY, Configuration
from bench_probe import device, on_cuda
from deepspeed.utils import set_z3_leaf_modules
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.integrations.deepspeed import HfDeepSpeedConfig

import agsel
from agsel.blocks import decoder_layers
from agsel.errors import UserError
from agsel.planning.memory import spread_evenly
from agsel.planning.shapes import model_config
from agsel.policies import blocks_of_fraction

Starter = Callable[[PreTrainedModel, Configuration], tuple[Any, "agsel.Selection | None"]]
"""Takes a model from `build_model`, returns an engine and agsel's selection on it, if there is one."""


def build_model(configuration: Configuration) -> PreTrainedModel:
    """The model with random weights, equal on all ranks, bf16, made on the device; with the kernels asked for."""
    config = model_config(configuration.model)
    config.use_cache = False
    torch.manual_seed(0)
    with torch.device(device()):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation="sdpa")
    model.train()
    if configuration.liger != "none":
        use_liger(model, loss_only=configuration.liger == "loss")
    if configuration.checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.disable_input_require_grads()  # else every backward reaches the embedding, through frozen layers too
    if configuration.compile:
        agsel.compile_layers(model)
    return model


def use_liger(model: PreTrainedModel, loss_only: bool) -> None:
    """Liger's kernels, or its fused linear cross-entropy alone."""
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN

    in_layers = dict.fromkeys(("rope", "rms_norm", "swiglu"), not loss_only)
    apply = MODEL_TYPE_TO_APPLY_LIGER_FN[model.config.model_type]
    apply(model=model, fused_linear_cross_entropy=True, cross_entropy=False, **in_layers)


@contextmanager
def restored_modules(configuration: Configuration) -> Iterator[None]:
    """Put back what is replaced for the whole process: Liger replaces a model's functions, ZeRO-3 one of torch's."""
    model_class = AutoModelForCausalLM._model_mapping[type(model_config(configuration.model))]
    modules = [torch.nn.functional, sys.modules[model_class.__module__]]
    before = [dict(vars(module)) for module in modules]
    try:
        yield
    finally:
        for module, names in zip(modules, before, strict=True):
            vars(module).update(names)


def zero_config(configuration: Configuration) -> dict[str, Any]:
    """The shipped DeepSpeed configuration of the stage with its open values filled in."""
    config = json.loads((REPOSITORY / "ds_configs" / f"zero{configuration.stage}.json").read_text())
    del config["train_batch_size"]  # follows from the other two and the number of ranks
    config["train_micro_batch_size_per_gpu"] = configuration.micro_batch
    config["gradient_accumulation_steps"] = configuration.accumulation
    config["gradient_clipping"] = 1.0
    config["bf16"]["enabled"], config["fp16"]["enabled"] = True, False
    return config


def start(model: nn.Module, optimizer: torch.optim.Optimizer, config: dict[str, Any]) -> Any:
    """A DeepSpeed engine."""
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    engine.train()
    return engine


def adam(groups: list[dict[str, Any]]) -> torch.optim.AdamW:
    """The optimizer of every method but ZeRO-Offload."""
    return torch.optim.AdamW(groups, lr=1e-5, fused=on_cuda())


def trainable(model: nn.Module) -> list[dict[str, Any]]:
    """One param group of all that is not frozen."""
    return [{"params": [parameter for parameter in model.parameters() if parameter.requires_grad]}]


def start_full(model: PreTrainedModel, configuration: Configuration) -> tuple[Any, None]:
    """Every weight trained, by stock DeepSpeed."""
    return start(model, adam(trainable(model)), zero_config(configuration)), None


def start_full_layers(model: PreTrainedModel, configuration: Configuration) -> tuple[Any, None]:
    """Every weight trained, by stock DeepSpeed that gathers a decoder layer as a whole at ZeRO-3."""
    set_z3_leaf_modules(model, [type(decoder_layers(model)[0])])
    return start_full(model, configuration)


def start_bound(model: PreTrainedModel, configuration: Configuration) -> tuple[Any, None]:
    """Always the same layers trained, by stock DeepSpeed: what selection can reach at best."""
    layers = [block for block in agsel.find_blocks(model) if block.is_layer]
    model.requires_grad_(False)
    chosen = [layers[index].parameters for index in expected_set(len(layers), configuration.fraction)]
    for parameter in (parameter for parameters in chosen for parameter in parameters):
        parameter.requires_grad_(True)
    return start(model, adam([{"params": list(parameters)} for parameters in chosen]), zero_config(configuration)), None


def expected_set(layers: int, fraction: float) -> list[int]:
    """The expected order statistics of k layers drawn at random: on average the backward goes as deep as theirs."""
    return spread_evenly(layers, blocks_of_fraction(fraction, layers))


def selecting(policy_of: Callable[[float], agsel.Policy]) -> Starter:
    """agsel with the policy made from the fraction."""

    def start_selection(model: PreTrainedModel, configuration: Configuration) -> tuple[Any, agsel.Selection]:
        with agsel.lean_initialization():
            engine = start(model, adam(agsel.block_param_groups(model)), zero_config(configuration))
        policy = policy_of(configuration.fraction)
        return engine, agsel.attach(engine, policy, offload_states=configuration.offload_states)

    return start_selection


def adapting(rank: int) -> Starter:
    """LoRA adapters of this rank on all linear layers, everything else frozen."""

    def start_lora(model: PreTrainedModel, configuration: Configuration) -> tuple[Any, None]:
        from peft import LoraConfig, get_peft_model

        lora = LoraConfig(r=rank, lora_alpha=rank, target_modules="all-linear", task_type="CAUSAL_LM")
        adapted = get_peft_model(model, lora, autocast_adapter_dtype=False)
        return start(adapted, adam(trainable(adapted)), zero_config(configuration)), None

    return start_lora


def start_zero_offload(model: PreTrainedModel, configuration: Configuration) -> tuple[Any, None]:
    """Full fine-tuning with optimizer and its states on the host."""
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    config = zero_config(configuration)
    config["zero_optimization"]["offload_optimizer"] = {"device": "cpu", "pin_memory": True}
    return start(model, DeepSpeedCPUAdam(trainable(model), lr=1e-5, adamw_mode=True), config), None


def start_badam(model: PreTrainedModel, configuration: Configuration) -> tuple[Any, None]:
    """The BAdam package: k layers at a time, in turns of 50 steps."""
    if configuration.stage != 3:
        raise UserError("the badam package supports ZeRO-3, or one GPU without DeepSpeed")
    config = zero_config(configuration)
    model.zero_stage = HfDeepSpeedConfig(config)  # badam asks transformers for the stage, which holds a weak reference
    from badam import BlockOptimizer

    layers = model.config.num_hidden_layers
    turns = max(1, round(layers / len(expected_set(layers, configuration.fraction))))
    optimizer = BlockOptimizer(
        base_optimizer=adam(trainable(model)),
        named_parameters_list=list(model.named_parameters()),
        block_prefix_list=[[f"model.layers.{layer}." for layer in range(turn, layers, turns)] for turn in range(turns)],
        switch_block_every=50,
    )
    engine = start(model, optimizer, config)
    engine.optimizer.optimizer.ds_optimizer = engine.optimizer
    return engine, None


METHODS: dict[str, Starter] = {
    "full": start_full,
    "full-layers": start_full_layers,
    "bound": start_bound,
    "fixed": selecting(lambda fraction: agsel.RandomBlocks(fraction=fraction, every=10**9)),
    "exploit": selecting(lambda fraction: agsel.AdaGradSelect(fraction=fraction, explore_steps=0, dirichlet_delta=1e6)),
    "explore": selecting(lambda fraction: agsel.AdaGradSelect(fraction=fraction, explore_steps=10**9, epsilon_end=1.0)),
    "topk": selecting(lambda fraction: agsel.TopK(fraction=fraction)),
    "lisa": selecting(lambda fraction: agsel.RandomBlocks(fraction=fraction, every=20)),
    "lora-256": adapting(256),
    "lora-16": adapting(16),
    "zero-offload": start_zero_offload,
    "badam": start_badam,
}
