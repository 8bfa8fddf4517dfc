"""Runs of the tiny model over chosen elements, on the ranks of test_training.py."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import agsel
from tests.cases import run_cases
from tests.zero.parity_ranks import whole_weights
from tests.zero.rules import RULES
from tests.zero.scenario import Scenario, run_engine, start_engine

FULL = agsel.FullFineTuning
NOTHING_KEPT = {"stage3_max_live_parameters": 0, "stage3_max_reuse_distance": 0}
"""So that ZeRO-3 gathers a weight again for its backward, and with it whatever has not been written into it."""
EVERYWHERE = Scenario(stage=2, blocks="layers", elements=True)
PARITY = {
    f"stage{stage}-accumulation{accumulation}-clip{clip}": replace(
        EVERYWHERE, stage=stage, accumulation=accumulation, clip=clip
    )
    for stage in (1, 2, 3)
    for accumulation, clip in ((1, 0.1), (3, 0.0))
}
PARITY |= {
    f"stage{stage}-all-blocks": replace(EVERYWHERE, stage=stage, policy=FULL, accumulation=2) for stage in (1, 2, 3)
}
PARITY |= {f"stage{stage}-compiled": replace(EVERYWHERE, stage=stage, compiled=True) for stage in (1, 2)}
PARITY |= {f"stage{stage}-checkpointing": replace(EVERYWHERE, stage=stage, checkpointing=True) for stage in (2, 3)}
PARITY |= {
    "stage3-nothing-kept": replace(EVERYWHERE, stage=3, zero=NOTHING_KEPT),
    "stage3-persistent": replace(EVERYWHERE, stage=3, zero={"stage3_param_persistence_threshold": 10_000}),
    "stage3-values-persistent": replace(EVERYWHERE, stage=3, zero={"stage3_param_persistence_threshold": 150}),
    "stage2-badam": replace(EVERYWHERE, policy=RULES["badam"], accumulation=2),
    "stage3-grass": replace(EVERYWHERE, stage=3, policy=RULES["grass"]),
    "stage1-lisa": replace(EVERYWHERE, stage=1, policy=RULES["lisa"]),
}


def trained(scenario: Scenario) -> dict[str, Any]:
    """Losses, final weights, and numbers in the optimizer's states."""
    engine, selection = start_engine(scenario)
    record = run_engine(engine, selection, scenario)
    states = {
        partition.index: (partition.master.numel(), selection.blocks[partition.block])
        for partition in selection.residency.partitions
    }
    return {"record": record, "weights": whole_weights(engine), "states": states}


if __name__ == "__main__":
    run_cases({name: partial(trained, scenario) for name, scenario in PARITY.items()})
