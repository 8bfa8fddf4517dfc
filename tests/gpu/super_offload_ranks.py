"""A real SuperOffload engine, on the ranks of test_guards.py."""

from __future__ import annotations

from typing import Any

import deepspeed

import agsel
from tests.cases import message_of, run_cases
from tests.tiny import tiny_model
from tests.zero.scenario import Scenario


def super_offload() -> str | None:
    zero = {"offload_optimizer": {"device": "cpu", "super_offload": True, "ratio": 0.9, "pin_memory": False}}
    engine = engine_of(Scenario(stage=3, dtype="bf16", zero=zero))
    return message_of(ValueError, lambda: agsel.attach(engine, agsel.FullFineTuning()))


def engine_of(scenario: Scenario) -> Any:
    """An engine whose optimizer DeepSpeed builds itself: SuperOffload needs its CPU Adam."""
    model = tiny_model()
    config = scenario.deepspeed_config() | {"optimizer": {"type": "AdamW", "params": {"lr": 1e-3}}}
    engine, *_ = deepspeed.initialize(model=model, model_parameters=list(model.parameters()), config=config)
    return engine


if __name__ == "__main__":
    run_cases({"super_offload": super_offload})
