"""Ranks that disagree, gradients that are not finite, blocks cut off from the loss: on the ranks of test_faults.py."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from typing import Any

import torch

import agsel
from agsel.elements import element_layers
from tests.cases import message_of, run_cases
from tests.tiny import random_mask, tiny_batch, tiny_model
from tests.zero.parity_ranks import whole_weights
from tests.zero.scenario import Scenario, run_engine, start_engine, train_step


def poisoned_step(engine: Any, step: int, value: float, *, in_loss: bool = False) -> None:
    """One optimizer step with a non-finite loss or gradient on the last rank, the latter only in a part of another."""
    rank = torch.distributed.get_rank()
    ids = tiny_batch(step, 0, rank).to(engine.device)

    def poison(gradient: torch.Tensor) -> torch.Tensor:
        poisoned = gradient.clone()
        poisoned[0] = value
        return poisoned

    loss = engine(input_ids=ids, labels=ids).loss
    parameter = next(p for p in engine.module.parameters() if p.requires_grad)
    hook = None
    if rank == torch.distributed.get_world_size() - 1:
        if in_loss:
            loss = loss * value
        else:
            hook = parameter.register_hook(poison)
    engine.backward(loss)
    if hook is not None:
        hook.remove()
    engine.step()
    for micro_step in range(1, engine.gradient_accumulation_steps()):
        ids = tiny_batch(step, micro_step, rank).to(engine.device)
        engine.backward(engine(input_ids=ids, labels=ids).loss)
        engine.step()


def non_finite(
    stage: int, dtype: str, value: float, *, in_loss: bool = False, accumulation: int = 1, choose_early: bool = False
) -> dict[str, Any]:
    """A poisoned step in the middle of a run, and the same run without it."""
    config = {"fp16": {"enabled": True, "initial_scale_power": 4, "hysteresis": 1}} if dtype == "fp16" else {}
    scenario = Scenario(stage=stage, dtype=dtype, steps=8, config=config, accumulation=accumulation)
    if choose_early:
        scenario = replace(scenario, choose_early=True, policy=partial(agsel.TopK, fraction=0.5))
    engine, selection = start_engine(scenario)
    for step in range(4):
        train_step(engine, step, accumulation)
    before, counts, scale = whole_weights(engine), selection.counts, engine.optimizer.loss_scale
    poisoned_step(engine, 4, value, in_loss=in_loss)
    unchanged = all(torch.equal(before[name], weights) for name, weights in whole_weights(engine).items())
    result = {
        "unchanged": unchanged and selection.counts == counts,
        "mode": selection.last.mode,
        "scale ratio": engine.optimizer.loss_scale / scale,
        "skipped": engine.skipped_steps,
    }
    run_engine(engine, selection, scenario, first=4)
    result["after"] = whole_weights(engine)
    engine, selection = start_engine(scenario)
    run_engine(engine, selection, scenario)
    return result | {"clean": whole_weights(engine), "steps": selection.policy.step}


def never_finite(stage: int) -> str | None:
    """Every step is poisoned."""
    engine, _ = start_engine(Scenario(stage=stage), max_skipped_steps=3)

    def run() -> None:
        for step in range(10):
            poisoned_step(engine, step, math.nan)

    return message_of(RuntimeError, run)


def mutated_policy(stage: int) -> str | None:
    """One rank's counts are changed behind agsel's back after three steps."""
    engine, selection = start_engine(Scenario(stage=stage))
    for step in range(3):
        train_step(engine, step, 1)
    if torch.distributed.get_rank() == 1:
        selection.policy.counts[0] += 1
    return message_of(agsel.RanksDisagreeError, lambda: train_step(engine, 3, 1))


def different_seeds() -> str | None:
    seed = torch.distributed.get_rank()
    scenario = Scenario(stage=2, policy=partial(agsel.RandomBlocks, fraction=0.5, seed=seed))
    return message_of(ValueError, lambda: start_engine(scenario))


def different_masks() -> dict[str, str | None]:
    """On one rank as many elements of each weight at other places, or fewer, or none of one weight."""
    mask = random_mask(tiny_model(), 0.1)
    name, *others = mask.indices
    masks = {
        "elsewhere": {name: torch.arange(len(own), dtype=torch.int32) for name, own in mask.indices.items()},
        "fewer": {**mask.indices, name: mask.indices[name][1:]},
        "another": {other: mask.indices[other] for other in others},
    }
    is_other = torch.distributed.get_rank() == 1
    return {
        kind: message_of(
            ValueError, partial(agsel.use_elements, tiny_model(), replace(mask, indices=own) if is_other else mask)
        )
        for kind, own in masks.items()
    }


def changed_mask(stage: int) -> str | None:
    """One rank has other indices, as many, when its engine is given to agsel."""
    scenario = Scenario(stage=stage, blocks="layers", elements=True)
    model = scenario.model()
    if torch.distributed.get_rank() == 1:
        layer = next(iter(element_layers(model).values()))
        layer.indices = torch.arange(len(layer.indices), dtype=torch.int32)
    return message_of(ValueError, lambda: start_engine(scenario, model=model))


def checkpointed(stage: int, reentrant: bool | None) -> dict[str, Any]:
    """A run with gradient checkpointing (None: without) and a frozen embedding."""
    scenario = Scenario(stage=stage, blocks="layers", steps=6)
    engine, selection = start_engine(scenario)
    if reentrant is not None:
        engine.module.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        engine.module.train()
    record = run_engine(engine, selection, scenario)
    return {"losses": record.losses, "weights": whole_weights(engine)}


def cut_off(stage: int) -> str | None:
    """Reentrant checkpointing without input gradients: layers get none although they are trainable."""
    scenario = Scenario(stage=stage, blocks="all", policy=lambda: agsel.RandomBlocks(fraction=0.9, seed=0))
    engine, selection = start_engine(scenario)
    engine.module.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    engine.module.disable_input_require_grads()
    engine.module.train()
    return message_of(RuntimeError, lambda: run_engine(engine, selection, scenario))


CASES: dict[str, partial[Any]] = {
    "different-seeds": partial(different_seeds),
    "different-masks": partial(different_masks),
}
for stage in (1, 2, 3):
    CASES |= {
        f"nan-{stage}": partial(non_finite, stage, "fp32", math.nan),
        f"inf-{stage}": partial(non_finite, stage, "fp32", math.inf),
        f"nan-loss-{stage}": partial(non_finite, stage, "fp32", math.nan, in_loss=True),
        f"inf-loss-{stage}": partial(non_finite, stage, "fp32", math.inf, in_loss=True),
        f"overflow-{stage}": partial(non_finite, stage, "fp16", math.inf),
        f"never-finite-{stage}": partial(never_finite, stage),
        f"mutated-{stage}": partial(mutated_policy, stage),
        f"plain-{stage}": partial(checkpointed, stage, None),
        f"not-reentrant-{stage}": partial(checkpointed, stage, False),
        f"reentrant-{stage}": partial(checkpointed, stage, True),
        f"cut-off-{stage}": partial(cut_off, stage),
        f"changed-mask-{stage}": partial(changed_mask, stage),
    }

CASES |= {
    f"early-{stage}": partial(non_finite, stage, "fp32", math.inf, accumulation=2, choose_early=True)
    for stage in (2, 3)
}

if __name__ == "__main__":
    run_cases(CASES)
