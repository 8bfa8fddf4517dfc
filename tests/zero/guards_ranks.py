"""Engines that agsel must refuse, on the ranks of test_guards.py."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from typing import Any
from unittest import mock

import deepspeed
import torch
from deepspeed.moe.layer import MoE
from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer
from deepspeed.pipe import PipelineModule
from deepspeed.runtime.zero.offload_config import DeepSpeedZeroOffloadOptimizerConfig

import agsel
from agsel import upstream
from tests.cases import logged, message_of, run_cases
from tests.tiny import tiny_model
from tests.zero.scenario import ADAM, SELECTING, Scenario, start_engine

OFFLOAD = {"offload_optimizer": {"device": "cpu", "pin_memory": False}}
OPTIMIZER_ON_CPU = {"zero_force_ds_cpu_optimizer": False}


def refused(**scenario: Any) -> str | None:
    return message_of(ValueError, lambda: start_engine(Scenario(**scenario)))


def chosen_early(stage: int, accumulation: int, policy: Callable[[], agsel.Policy] = SELECTING) -> str | None:
    return refused(stage=stage, accumulation=accumulation, policy=policy, choose_early=True)


def stage_0() -> str | None:
    return refused(stage=0)


def bf16_optimizer() -> str | None:
    return refused(stage=1, dtype="bf16", config={"data_types": {"grad_accum_dtype": "fp32"}})


def offload_optimizer(stage: int) -> str | None:
    return refused(stage=stage, zero=OFFLOAD, config=OPTIMIZER_ON_CPU)


def offload_param() -> str | None:
    return refused(stage=3, zero={"offload_param": {"device": "cpu", "pin_memory": False}})


def module_granularity() -> str | None:
    return refused(stage=3, zero={"stage3_module_granularity_threshold": 2000})


def sequential_gather() -> str | None:
    return refused(stage=3, zero={"stage3_allgather_sequential": True})


def elements_twice_partitioned() -> str | None:
    return refused(stage=3, elements=True, blocks="layers", zero={"zero_hpz_partition_size": 2})


def round_robin_gradients() -> str | None:
    return refused(stage=2, zero={"round_robin_gradients": True})


def layers_by_keyword() -> str | None:
    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = torch.nn.ModuleList([torch.nn.Linear(8, 8), torch.nn.Linear(8, 8)])

        def forward(self, hidden: torch.Tensor) -> torch.Tensor:
            for layer in self.layers:
                hidden = layer(input=hidden)
            return hidden

    model = Model()
    optimizer = torch.optim.AdamW(agsel.block_param_groups(model), **ADAM)  # type: ignore[arg-type]
    config = Scenario(stage=3).deepspeed_config()
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    agsel.attach(engine, agsel.FullFineTuning())
    return message_of(ValueError, lambda: engine(torch.ones(2, 8, device=engine.device)))


def elastic_checkpoint() -> str | None:
    return refused(stage=2, zero={"elastic_checkpoint": True})


def zenflow() -> str | None:
    """With torch's Adam: DeepSpeed's own for the CPU, which ZenFlow takes unless told so, compiles for a minute."""
    options = {"topk_ratio": 0.5, "select_strategy": "step", "select_interval": 2, "update_interval": 1}
    zero = OFFLOAD | {"zenflow": options | {"overlap_step": False}}
    of_selected = {"optimizer": {"type": "AdamW", "params": {"lr": 1e-3}}}
    return refused(stage=2, zero=zero, config=OPTIMIZER_ON_CPU | of_selected)


def super_offload() -> str | None:
    """SuperOffload itself starts on CUDA only (tests/gpu), so the setting is made after `initialize`."""
    engine, _ = start_engine(Scenario(stage=3), attach=False)
    engine._config.zero_config.offload_optimizer = DeepSpeedZeroOffloadOptimizerConfig(device="cpu", super_offload=True)
    return message_of(ValueError, lambda: agsel.attach(engine, agsel.FullFineTuning()))


def moe() -> str | None:
    class Layer(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.moe = MoE(hidden_size=8, expert=torch.nn.Linear(8, 8), num_experts=2, ep_size=1)

    model = torch.nn.Module()
    model.layers = torch.nn.ModuleList([Layer(), Layer()])
    groups = split_params_into_different_moe_groups_for_optimizer({"params": list(model.parameters()), "name": "all"})
    optimizer = torch.optim.AdamW(groups, **ADAM)  # type: ignore[arg-type]
    config = Scenario(stage=2, dtype="bf16").deepspeed_config()
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    return message_of(ValueError, lambda: agsel.attach(engine, agsel.FullFineTuning()))


def pipeline() -> str | None:
    model = PipelineModule(
        layers=[torch.nn.Linear(8, 8), torch.nn.Linear(8, 8)], num_stages=1, loss_fn=torch.nn.MSELoss()
    )
    config = Scenario(stage=1).deepspeed_config()
    optimizer = torch.optim.AdamW(model.parameters(), **ADAM)  # type: ignore[arg-type]
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    return message_of(ValueError, lambda: agsel.attach(engine, agsel.FullFineTuning()))


def attached_to(make_optimizer: Callable[[Any], torch.optim.Optimizer]) -> str | None:
    model = tiny_model()
    config = Scenario(stage=2).deepspeed_config()
    engine, *_ = deepspeed.initialize(model=model, optimizer=make_optimizer(model), config=config)
    return message_of(ValueError, lambda: agsel.attach(engine, agsel.FullFineTuning()))


def frozen_after_grouping() -> str | None:
    """A block frozen between the param groups and `initialize`: stage 3 drops it silently."""
    model = tiny_model()
    optimizer = torch.optim.AdamW(agsel.block_param_groups(model, "all"), **ADAM)  # type: ignore[arg-type]
    frozen = agsel.find_blocks(model)[2]
    for parameter in frozen.parameters:
        parameter.requires_grad_(False)
    config = Scenario(stage=3).deepspeed_config()
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    return message_of(ValueError, lambda: agsel.attach(engine, agsel.FullFineTuning()))


def attached_twice() -> str | None:
    engine, _ = start_engine(Scenario(stage=2))
    return message_of(ValueError, lambda: agsel.attach(engine, agsel.FullFineTuning()))


def offloaded_by_deepspeed(stage: int) -> str | None:
    engine, _ = start_engine(Scenario(stage=stage))
    return message_of(ValueError, engine.offload_states)


def sgd(model: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(agsel.block_param_groups(model, "all"), lr=0.1)


def one_group(model: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), **ADAM)  # type: ignore[arg-type]


def head_left_out(model: Any) -> torch.optim.Optimizer:
    groups = agsel.block_param_groups(model, "all")
    return torch.optim.AdamW(groups[:-1], **ADAM)  # type: ignore[arg-type]


def changed_deepspeed(allowed: str) -> str | None:
    """A DeepSpeed one of whose overridden methods is not the tested one."""
    changed = {"deepspeed.runtime.zero.stage_1_and_2:DeepSpeedZeroOptimizer.get_flat_partition": "0"}
    with (
        mock.patch.dict(upstream.table()["checksums"]["agsel.zero.stage_1_and_2"], changed),
        mock.patch.dict(os.environ, {"AGSEL_ALLOW_UNTESTED": allowed}),
    ):
        return message_of(RuntimeError, lambda: start_engine(Scenario(stage=2)))


def model_with_a_selection() -> str | None:
    """DeepSpeed's engine answers with attributes of its model."""
    model = tiny_model()
    model.selection = "of the model's own"
    return message_of(ValueError, lambda: start_engine(Scenario(stage=2), model=model))


def said_of_reduce_scatter(stage: int, zero: dict[str, Any]) -> str:
    """What agsel logs when the user has set it, or has not."""
    with logged() as messages:
        start_engine(Scenario(stage=stage, zero=zero))
    return "\n".join(messages)


CASES: dict[str, Callable[[], str | None]] = {
    "stage 0": stage_0,
    "early of one": partial(chosen_early, 2, 1),
    "early at stage 1": partial(chosen_early, 1, 2),
    "early without exploring": partial(chosen_early, 2, 2, partial(agsel.RandomBlocks, fraction=0.5)),
    "bf16 optimizer": bf16_optimizer,
    "offload_optimizer 2": partial(offload_optimizer, 2),
    "offload_optimizer 3": partial(offload_optimizer, 3),
    "offload_param": offload_param,
    "module granularity": module_granularity,
    "sequential gather": sequential_gather,
    "elements and hpz": elements_twice_partitioned,
    "round_robin_gradients": round_robin_gradients,
    "layers by keyword": layers_by_keyword,
    "elastic_checkpoint": elastic_checkpoint,
    "zenflow": zenflow,
    "super_offload": super_offload,
    "moe": moe,
    "pipeline": pipeline,
    "offload_states 2": partial(offloaded_by_deepspeed, 2),
    "offload_states 3": partial(offloaded_by_deepspeed, 3),
    "sgd": partial(attached_to, sgd),
    "one group": partial(attached_to, one_group),
    "head left out": partial(attached_to, head_left_out),
    "frozen after grouping": frozen_after_grouping,
    "attached twice": attached_twice,
    "changed deepspeed": partial(changed_deepspeed, "0"),
    "changed deepspeed, allowed": partial(changed_deepspeed, "1"),
    "model with a selection": model_with_a_selection,
    "reduce_scatter 1": partial(said_of_reduce_scatter, 1, {"reduce_scatter": True}),
    "reduce_scatter 2": partial(said_of_reduce_scatter, 2, {"reduce_scatter": True}),
    "reduce_scatter 3": partial(said_of_reduce_scatter, 3, {"reduce_scatter": True}),
    "reduce_scatter false": partial(said_of_reduce_scatter, 2, {"reduce_scatter": False}),
    "reduce_scatter unset": partial(said_of_reduce_scatter, 2, {}),
}

if __name__ == "__main__":
    run_cases(CASES)
