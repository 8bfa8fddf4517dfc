"""One global batch on however many ranks there are: what test_global_batch.py compares."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import torch

import agsel
from tests.cases import run_cases
from tests.distributed import RANKS
from tests.tiny import tiny_batch
from tests.zero.rules import RULES
from tests.zero.scenario import Record, Scenario, start_engine

STEPS = 50
ROWS = max(4, RANKS)
SCENARIOS = {
    name: Scenario(
        stage=2,
        dtype="bf16",
        clip=1.0,
        blocks="all" if name == "lisa" else "layers",
        adapters="lora" if name == "ist" else None,
        steps=20 if name in RULES else STEPS,
        policy=policy,
    )
    for name, policy in {
        "adagradselect": partial(agsel.AdaGradSelect, fraction=0.5, explore_steps=STEPS, epsilon_end=0.5, seed=6),
        **RULES,
    }.items()
}


def selections(name: str) -> Record:
    """Train on `ROWS` rows per step, divided among the ranks."""
    ranks, rank = torch.distributed.get_world_size(), torch.distributed.get_rank()
    config: dict[str, Any] = {"train_micro_batch_size_per_gpu": ROWS // ranks}
    engine, selection = start_engine(replace(SCENARIOS[name], config=config))
    record = Record()
    for step in range(SCENARIOS[name].steps):
        ids = tiny_batch(step, 0, 0, rows=ROWS)[rank::ranks].to(engine.device)
        engine.backward(engine(input_ids=ids, labels=ids).loss)
        engine.step()
        record.selected.append(selection.last.selected)
        record.modes.append(selection.last.mode)
        record.norms.append(selection.last.norms)
    return record


if __name__ == "__main__":
    run_cases({name: partial(selections, name) for name in SCENARIOS})
