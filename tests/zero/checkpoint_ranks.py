"""Save, go on, and resume in a fresh process group: on the ranks of test_checkpoint.py."""

from __future__ import annotations

import os
from dataclasses import replace
from functools import partial
from typing import Any

import agsel
from tests.cases import run_cases
from tests.zero.exactness_ranks import optimizer_states
from tests.zero.parity_ranks import whole_weights
from tests.zero.scenario import Scenario, run_engine, start_engine, train_step

SAVED_AFTER = 7
SCENARIOS = {
    stage: Scenario(
        stage=stage,
        steps=16,
        accumulation=2,
        blocks="layers",
        fused=stage != 1,  # fused AdamW keeps its step count on the device, also of evicted blocks
        policy=partial(agsel.AdaGradSelect, fraction=0.3, explore_steps=12, epsilon_start=0.6, epsilon_end=0.5, seed=0),
    )
    for stage in (1, 2, 3)
}
SEED_THAT_BEGINS_WITH_ANOTHER_FROZEN_SET = 7


def folder(stage: int) -> str:
    return os.path.join(os.environ["AGSEL_TEST_CHECKPOINTS"], f"stage{stage}")


def outcome(engine: Any, selection: Any, record: Any) -> dict[str, Any]:
    return {
        "losses": record.losses[-(16 - SAVED_AFTER) :],
        "selected": record.selected[-(16 - SAVED_AFTER) :],
        "modes": record.modes[-(16 - SAVED_AFTER) :],
        "weights": whole_weights(engine),
        "states": optimizer_states(engine, selection),
        "counts": selection.counts,
    }


def uninterrupted(stage: int) -> dict[str, Any]:
    engine, selection = start_engine(SCENARIOS[stage])
    return outcome(engine, selection, run_engine(engine, selection, SCENARIOS[stage]))


def saved(stage: int) -> dict[str, Any]:
    """Save after some steps, and go on."""
    scenario = SCENARIOS[stage]
    engine, selection = start_engine(scenario)
    for step in range(SAVED_AFTER):
        train_step(engine, step, scenario.accumulation)
    at_save = {"counts": selection.counts, "resident": selection.resident, "planned": selection.policy.plan()}
    frozen = [name for name, parameter in engine.module.named_parameters() if not parameter.requires_grad]
    engine.save_checkpoint(folder(stage), client_state={"mine": 42})
    assert frozen == [name for name, parameter in engine.module.named_parameters() if not parameter.requires_grad]
    return outcome(engine, selection, run_engine(engine, selection, scenario, first=SAVED_AFTER)) | {"at save": at_save}


def resumed(stage: int) -> dict[str, Any]:
    """Load what `saved` saved into a fresh process group in which other blocks are frozen, and go on."""
    scenario = SCENARIOS[stage]
    other_seed = partial(scenario.policy, seed=SEED_THAT_BEGINS_WITH_ANOTHER_FROZEN_SET)
    engine, selection = start_engine(replace(scenario, policy=other_seed))
    planned_before_load = selection.policy.plan()
    path, client_state = engine.load_checkpoint(folder(stage))
    assert path is not None
    return outcome(engine, selection, run_engine(engine, selection, scenario, first=SAVED_AFTER)) | {
        "client state": client_state["mine"],
        "resident after load": selection.resident,
        "planned before load": planned_before_load,
    }


def other_blocks(stage: int) -> str:
    """Load a checkpoint over the decoder layers into a run over all blocks."""
    scenario = Scenario(stage=stage, blocks="all")
    engine, _ = start_engine(scenario)
    try:
        engine.load_checkpoint(folder(stage), load_optimizer_states=False)
    except ValueError as error:
        return str(error)
    return ""


def warm_start(stage: int) -> dict[str, Any]:
    """Counts before and after loading the weights alone, in the middle of a run that checks itself."""
    engine, selection = start_engine(SCENARIOS[stage], sanity_checks=1)
    run_engine(engine, selection, replace(SCENARIOS[stage], steps=3))
    before = selection.counts
    engine.load_checkpoint(folder(stage), load_module_only=True)
    after = selection.counts
    run_engine(engine, selection, replace(SCENARIOS[stage], steps=5), first=3)
    return {"before": before, "after": after, "steps": selection.policy.step}


CASES = {
    f"{action.__name__}-{stage}": partial(action, stage)
    for action in (uninterrupted, saved, resumed, other_blocks, warm_start)
    for stage in (1, 2, 3)
}

if __name__ == "__main__":
    run_cases(CASES)
