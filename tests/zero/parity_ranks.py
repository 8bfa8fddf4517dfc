"""Runs of the tiny model under agsel, and under stock DeepSpeed, on the ranks of test_parity.py."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from itertools import product
from typing import Any, Literal

import torch

import agsel
from agsel.blocks import decoder_layers
from tests.cases import run_cases
from tests.zero.rules import RULES, EveryClause
from tests.zero.scenario import SELECTING, Record, Scenario, run_engine, start_engine

OVER_ADAPTERS: list[tuple[int, str, Literal["lora", "dora"]]] = [
    *((1, "lisa", "lora"), (2, "badam", "lora"), (3, "grass", "lora"), (1, "badam", "dora")),
    *((3, "badam", "lora"), (2, "grass", "dora"), (2, "ist", "dora"), (3, "ist", "dora")),
]
KINDS_OF_ADAPTERS: tuple[Literal["lora", "dora"], ...] = ("lora", "dora")
HALF = partial(agsel.TopK, fraction=0.5)
EARLY = {
    "adagradselect": Scenario(stage=2, blocks="layers", policy=partial(SELECTING, explore_steps=16, epsilon_start=1.0)),
    "half": Scenario(stage=2, blocks="layers", policy=HALF),
    "half-over-lora": Scenario(stage=2, blocks="layers", policy=HALF, adapters="lora"),
    "every-clause": Scenario(stage=2, policy=partial(EveryClause, fraction=0.3, seed=5)),
}
"""Rules that explore, for which the first of three micro-batches chooses otherwise than all of them."""
PARITY = {
    f"stage{stage}-accumulation{accumulation}-clip{clip}-{blocks}": Scenario(
        stage=stage, accumulation=accumulation, clip=clip, blocks=blocks, tied=accumulation == 3
    )
    for stage, (accumulation, clip, blocks) in product(
        (1, 2, 3), [(1, 0.0, "layers"), (1, 0.3, "all"), (3, 0.0, "layers"), (3, 0.3, "all")]
    )
}
SMALL_BUCKETS = {"overlap_comm": True, "reduce_bucket_size": 1500, "stage3_prefetch_bucket_size": 1500}
PARITY |= {
    f"stage{stage}-small-buckets": Scenario(stage=stage, accumulation=3, clip=0.3, tied=True, zero=SMALL_BUCKETS)
    for stage in (1, 2, 3)
}
PARITY |= {f"stage{stage}-compiled": Scenario(stage=stage, clip=0.3, compiled=True) for stage in (1, 2)}
PARITY["stage2-not-contiguous"] = Scenario(stage=2, clip=0.3, zero={"contiguous_gradients": False})
PARITY["stage3-persistent"] = Scenario(stage=3, clip=0.3, zero={"stage3_param_persistence_threshold": 100})
LEAF_MODULES = {"leaf_module": {"classes": ["transformers.models.llama.modeling_llama.LlamaMLP"]}}
"""For DeepSpeed, as it takes mixtures of experts by default: all gradients of such a module come at once."""
PARITY["stage3-leaf-modules"] = Scenario(stage=3, clip=0.3, zero=LEAF_MODULES)
PARITY["stage3-several-sub-groups"] = Scenario(stage=3, clip=0.3, zero={"sub_group_size": 1000})
PARITY |= {
    f"stage{stage}-every-clause": Scenario(
        stage=stage, accumulation=2, clip=0.3, policy=partial(EveryClause, fraction=0.3, seed=5)
    )
    for stage in (1, 2, 3)
}
PARITY |= {
    f"stage{stage}-{rule}": Scenario(
        stage=stage, accumulation=2, clip=0.01, steps=12, policy=policy, adapters="lora" if rule == "ist" else None
    )
    for stage in (1, 2, 3)
    for rule, policy in RULES.items()
}
PARITY |= {
    f"stage{stage}-{rule}-over-{adapters}": Scenario(
        stage=stage, clip=0.01, blocks="layers", steps=12, policy=RULES[rule], adapters=adapters
    )
    for stage, rule, adapters in OVER_ADAPTERS
}
PARITY |= {
    f"stage{stage}-freezeout-over-lora": Scenario(
        stage=stage,
        clip=0.01,
        blocks="layers",
        steps=12,
        policy=partial(agsel.FreezeOut, freeze_steps=12),
        adapters="lora",
    )
    for stage in (1, 2, 3)
}
PARITY |= {
    f"stage3-checkpointing-over-{adapters}": Scenario(
        stage=3, accumulation=2, clip=0.01, blocks="layers", steps=12, adapters=adapters, checkpointing=True
    )
    for adapters in KINDS_OF_ADAPTERS
}
PARITY["stage3-checkpointing-ist"] = replace(PARITY["stage3-ist-over-dora"], checkpointing=True)
PARITY |= {f"stage{stage}-from-1": Scenario(stage=stage, clip=0.1, blocks="layers", select_from=1) for stage in (1, 3)}
PARITY |= {
    f"stage{stage}-early-{rule}": replace(scenario, stage=stage, accumulation=3, clip=0.01, choose_early=True)
    for stage in (2, 3)
    for rule, scenario in EARLY.items()
}
FULL = {
    f"full-stage{stage}-{dtype}{suffix}": Scenario(
        stage=stage, dtype=dtype, policy=agsel.FullFineTuning, steps=6, accumulation=2, config=config
    )
    for stage, (dtype, suffix, config) in product(
        (1, 2, 3),
        [
            ("fp32", "", {}),
            ("bf16", "", {}),
            ("bf16", "-fp32-accumulation", {"data_types": {"grad_accum_dtype": "fp32"}}),
            ("fp16", "", {"fp16": {"enabled": True, "initial_scale_power": 8}}),
        ],
    )
    if not (stage == 1 and suffix)  # DeepSpeed builds BF16_Optimizer there, which agsel refuses
}
FULL["full-stage3-hpz"] = Scenario(
    stage=3,
    policy=agsel.FullFineTuning,
    steps=6,
    zero={"zero_hpz_partition_size": 2, "stage3_param_persistence_threshold": 100},
)
"""Every host, here every two ranks, holds all weights once more, and gathers those of a step before if told so."""
RECOMPUTED = {
    "recomputed-stage3-lora": Scenario(stage=3, dtype="bf16", adapters="lora", blocks="layers", steps=6),
    "recomputed-stage3-dora": Scenario(
        stage=3, adapters="dora", blocks="layers", steps=6, policy=agsel.FullFineTuning, accumulation=2
    ),
}


def selective_run(scenario: Scenario) -> Record:
    engine, selection = start_engine(scenario)
    return run_engine(engine, selection, scenario)


def full_run(scenario: Scenario) -> dict[str, Any]:
    """Final weights and losses of agsel with every block selected, and of stock DeepSpeed."""
    runs = {}
    for name, attach in (("agsel", True), ("stock", False)):
        engine, selection = start_engine(scenario, attach=attach)
        losses = run_engine(engine, selection, scenario).losses
        runs[name] = {"losses": losses, "weights": whole_weights(engine)}
    return runs


def recomputed_run(scenario: Scenario) -> dict[str, Any]:
    """Final weights, losses and norms without and with gradient checkpointing, and how often a layer was computed."""
    runs = {}
    for name, checkpointing in (("plain", False), ("checkpointed", True)):
        engine, selection = start_engine(replace(scenario, checkpointing=checkpointing))
        forwards = count_forwards(engine)
        record = run_engine(engine, selection, scenario)
        runs[name] = {"record": record, "weights": whole_weights(engine), "forwards": len(forwards)}
    return runs


def count_forwards(engine: Any) -> list[None]:
    """One entry for every time that a layer is computed from now on."""
    forwards: list[None] = []
    for layer in decoder_layers(engine.module):
        layer.self_attn.register_forward_pre_hook(lambda *_: forwards.append(None))
    return forwards


def whole_weights(engine: Any) -> dict[str, torch.Tensor]:
    """The model's weights, gathered at stage 3."""
    import deepspeed

    with deepspeed.zero.GatheredParameters(list(engine.module.parameters())):
        return {name: p.detach().clone() for name, p in engine.module.named_parameters()}


if __name__ == "__main__":
    run_cases(
        {name: partial(selective_run, scenario) for name, scenario in PARITY.items()}
        | {name: partial(full_run, scenario) for name, scenario in FULL.items()}
        | {name: partial(recomputed_run, scenario) for name, scenario in RECOMPUTED.items()}
    )
