"""The engines of the methods that are compared, all with the same kernels and DeepSpeed settings.

transformers and other packages that take long to import are imported where they are needed: the command that only reads
`compared_methods` needs none of them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import deepspeed
import torch
from deepspeed.utils import set_z3_leaf_modules
from torch import nn

import agsel
from agsel import shipped
from agsel.blocks import decoder_layers, taking_part
from agsel.errors import UserError
from agsel.policies import blocks_of_fraction
from tools.bench.chosen_weights import linear_layers, random_mask, random_places
from tools.bench.configurations import Configuration
from tools.bench.device import on_cuda

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Starter = Callable[["PreTrainedModel", Configuration], tuple[Any, "agsel.Selection | None"]]
"""Takes a model from `build_model`, returns an engine and agsel's selection on it, if there is one."""
PolicyOf = Callable[[float], agsel.Policy]
"""Makes a policy for a fraction of the layers."""


def zero_config(configuration: Configuration) -> dict[str, Any]:
    """The shipped DeepSpeed configuration of the stage with its open values filled in."""
    config = shipped.configuration_of_stage(configuration.stage)
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


def start_trainable(model: PreTrainedModel, configuration: Configuration) -> tuple[Any, None]:
    """All that is not frozen, which is every weight of a model from `build_model`, by stock DeepSpeed."""
    return start(model, adam(trainable(model)), zero_config(configuration)), None


def start_full_layers(model: PreTrainedModel, configuration: Configuration) -> tuple[Any, None]:
    """Every weight trained, by stock DeepSpeed that gathers a decoder layer as a whole at ZeRO-3."""
    set_z3_leaf_modules(model, [type(decoder_layers(model)[0])])
    return start_trainable(model, configuration)


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
    from agsel.planning.memory import spread_evenly

    return spread_evenly(layers, blocks_of_fraction(fraction, layers))


def start_selection(
    policy_of: PolicyOf,
    model: PreTrainedModel,
    configuration: Configuration,
    *,
    lora_rank: int | None = None,
    folds: bool = False,
    elements: bool = False,
    early: bool = False,
) -> tuple[Any, agsel.Selection]:
    """agsel with the policy for the fraction, over all weights, LoRA adapters, or random elements of the density."""
    policy = policy_of(configuration.fraction)
    blocks = policy.scope(configuration.select_from)
    if lora_rank is not None:
        chosen = taking_part(agsel.find_blocks(model), blocks, configuration.select_from)
        model = with_adapters(model, lora_rank, chosen)
    if elements:
        agsel.use_elements(model, random_mask(model, configuration.density))
    with agsel.lean_initialization():
        groups = agsel.block_param_groups(model, blocks, configuration.select_from)
        engine = start(model, adam(groups), zero_config(configuration))
    options = {"offload_states": configuration.offload_states, "fold_adapters": folds, "choose_early": early}
    return engine, agsel.attach(engine, policy, **options)


def start_lora(rank: int, model: PreTrainedModel, configuration: Configuration) -> tuple[Any, None]:
    """LoRA adapters of this rank on all linear layers, everything else frozen."""
    return start_trainable(with_adapters(model, rank, agsel.find_blocks(model)), configuration)


def with_adapters(model: PreTrainedModel, rank: int, blocks: list[agsel.Block]) -> Any:
    """The model with LoRA adapters of this rank on all linear layers of these blocks, in its own type."""
    from peft import LoraConfig, get_peft_model

    from agsel.training.lora import layers_left_out

    left_out = layers_left_out(model, blocks)
    lora = LoraConfig(
        r=rank, lora_alpha=rank, target_modules="all-linear", exclude_modules=left_out, task_type="CAUSAL_LM"
    )
    return get_peft_model(model, lora, autocast_adapter_dtype=False)


def start_supertuning(model: PreTrainedModel, configuration: Configuration) -> tuple[Any, None]:
    """PEFT's Supertuning: in every forward a copy of each weight, to which the trained values are added."""
    return start_trainable(add_supertuning(model, configuration.density), configuration)


def add_supertuning(model: PreTrainedModel, density: float) -> Any:
    """The model with Supertuning of so many weights of every linear layer, in its own type."""
    from peft import SupertuningConfig, get_peft_model

    config = SupertuningConfig(sparsity=1 - density, target_modules="all-linear", task_type="CAUSAL_LM")
    return get_peft_model(model, config, autocast_adapter_dtype=False)


def start_shira(model: PreTrainedModel, configuration: Configuration) -> tuple[Any, None]:
    """PEFT's SHiRA, which adds sparse matrices of the trained values to copies of the weights in every forward."""
    return start_trainable(add_shira(model, configuration.density), configuration)


def add_shira(model: PreTrainedModel, density: float) -> PreTrainedModel:
    """SHiRA trains r (m + n) weights of m x n: here of each matrix with the whole r that is next to the density."""
    from peft import ShiraConfig, inject_adapter_in_model

    names_of: dict[int, list[str]] = {}
    for name, layer in linear_layers(model).items():
        rank = max(1, round(density * layer.weight.numel() / sum(layer.weight.shape)))
        names_of.setdefault(rank, []).append(name)
    for rank, names in names_of.items():
        config = ShiraConfig(r=rank, target_modules=names)
        config.mask_fn = _shira_mask  # PEFT's own shuffles the positions of all weights on the host
        inject_adapter_in_model(config, model)
    return model


def _shira_mask(layer: nn.Linear, rank: int, **_: Any) -> torch.Tensor:
    mask = torch.zeros_like(layer.weight, dtype=torch.bool)
    mask.view(-1)[random_places(layer.weight, rank * sum(layer.weight.shape)).long()] = True
    return mask


def start_zero_offload(model: PreTrainedModel, configuration: Configuration) -> tuple[Any, None]:
    """Full fine-tuning with optimizer and its states on the host."""
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    config = zero_config(configuration)
    config["zero_optimization"]["offload_optimizer"] = {"device": "cpu", "pin_memory": True}
    return start(model, DeepSpeedCPUAdam(trainable(model), lr=1e-5, adamw_mode=True), config), None


def start_badam(model: PreTrainedModel, configuration: Configuration) -> tuple[Any, None]:
    """The BAdam package: k layers at a time, in turns of 50 steps."""
    from transformers.integrations.deepspeed import HfDeepSpeedConfig

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
