"""Save, go on, and resume in a fresh process group: on the ranks of test_checkpoint.py."""

from __future__ import annotations

import os
from dataclasses import replace
from functools import partial
from typing import Any

import torch

import agsel
from tests.cases import message_of, run_cases
from tests.tiny import WITHOUT_ELEMENTS, random_mask, tiny_model
from tests.zero.exactness_ranks import optimizer_states
from tests.zero.parity_ranks import whole_weights
from tests.zero.rules import RULES, STAGES_OF_RULES
from tests.zero.scenario import Scenario, run_engine, start_engine, train_step

SAVED_AFTER = 7
STEPS = 16
POLICIES: dict[str, partial[agsel.Policy]] = {
    "adagradselect": partial(
        agsel.AdaGradSelect, fraction=0.3, explore_steps=12, epsilon_start=0.6, epsilon_end=0.5, seed=0
    ),
    **RULES,
}
SCENARIOS = {
    f"{rule}-{stage}": Scenario(
        stage=stage,
        steps=STEPS,
        accumulation=1 if rule in RULES else 2,
        blocks="all" if rule == "lisa" else "layers",
        fused=stage != 1,  # fused AdamW keeps its step count on the device, also of evicted blocks
        adapters="lora" if rule == "ist" else None,
        policy=policy,
    )
    for stage in (1, 2, 3)
    for rule, policy in POLICIES.items()
    if rule not in RULES or stage in STAGES_OF_RULES
}
SCENARIOS |= {
    f"elements-{stage}": replace(
        SCENARIOS[f"adagradselect-{stage}"], elements=True, policy=partial(POLICIES["adagradselect"], seed=21)
    )
    for stage in (1, 2, 3)
}
"""Three blocks of single weights; with this seed one has never been selected at the save, either."""
SEED_THAT_BEGINS_WITH_ANOTHER_FROZEN_SET = 7


def folder(run: str) -> str:
    return os.path.join(os.environ["AGSEL_TEST_CHECKPOINTS"], run)


def outcome(engine: Any, selection: Any, record: Any) -> dict[str, Any]:
    weights = whole_weights(engine)
    return {
        "losses": record.losses[-(STEPS - SAVED_AFTER) :],
        "selected": record.selected[-(STEPS - SAVED_AFTER) :],
        "modes": record.modes[-(STEPS - SAVED_AFTER) :],
        "weights": weights,
        "states": optimizer_states(engine, selection),
        "counts": selection.counts,
    }


def uninterrupted(run: str) -> dict[str, Any]:
    engine, selection = start_engine(SCENARIOS[run])
    return outcome(engine, selection, run_engine(engine, selection, SCENARIOS[run]))


def saved(run: str) -> dict[str, Any]:
    """Save after some steps, and go on."""
    scenario = SCENARIOS[run]
    engine, selection = start_engine(scenario)
    for step in range(SAVED_AFTER):
        train_step(engine, step, scenario.accumulation)
    at_save = {"counts": selection.counts, "resident": selection.resident, "planned": selection.policy.plan()}
    frozen = [name for name, parameter in engine.module.named_parameters() if not parameter.requires_grad]
    engine.save_checkpoint(folder(run), client_state={"mine": 42})
    assert frozen == [name for name, parameter in engine.module.named_parameters() if not parameter.requires_grad]
    return outcome(engine, selection, run_engine(engine, selection, scenario, first=SAVED_AFTER)) | {"at save": at_save}


def resumed(run: str) -> dict[str, Any]:
    """Load what `saved` saved into a fresh process group in which other blocks are frozen, and go on."""
    scenario = SCENARIOS[run]
    other_seed = partial(scenario.policy, seed=SEED_THAT_BEGINS_WITH_ANOTHER_FROZEN_SET)
    engine, selection = start_engine(replace(scenario, policy=other_seed))
    planned_before_load = selection.policy.plan()
    path, client_state = engine.load_checkpoint(folder(run))
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
        engine.load_checkpoint(folder(f"adagradselect-{stage}"), load_optimizer_states=False)
    except ValueError as error:
        return str(error)
    return ""


def other_elements(stage: int) -> str:
    """Load a checkpoint into a run over as many elements at other places."""
    model = tiny_model()
    mask = random_mask(model, 0.1, WITHOUT_ELEMENTS)
    first = {name: torch.arange(len(own), dtype=torch.int32) for name, own in mask.indices.items()}
    agsel.use_elements(model, replace(mask, indices=first))
    engine, _ = start_engine(SCENARIOS[f"elements-{stage}"], model=model)
    return message_of(ValueError, lambda: engine.load_checkpoint(folder(f"elements-{stage}"))) or ""


def warm_start(stage: int) -> dict[str, Any]:
    """Counts before and after loading the weights alone, in the middle of a run that checks itself."""
    scenario = SCENARIOS[f"adagradselect-{stage}"]
    engine, selection = start_engine(scenario, sanity_checks=1)
    run_engine(engine, selection, replace(scenario, steps=3))
    before = selection.counts
    engine.load_checkpoint(folder(f"adagradselect-{stage}"), load_module_only=True)
    after = selection.counts
    run_engine(engine, selection, replace(scenario, steps=5), first=3)
    return {"before": before, "after": after, "steps": selection.policy.step}


BEFORE = {f"{action.__name__}-{run}": partial(action, run) for action in (uninterrupted, saved) for run in SCENARIOS}
AFTER: dict[str, partial[Any]] = {
    **{f"resumed-{run}": partial(resumed, run) for run in SCENARIOS},
    **{
        f"{action.__name__}-{stage}": partial(action, stage)
        for action in (other_blocks, other_elements, warm_start)
        for stage in (1, 2, 3)
    },
}

if __name__ == "__main__":
    run_cases(BEFORE | AFTER)
