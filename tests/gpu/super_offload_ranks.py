"""A real SuperOffload engine, on the ranks of test_guards.py."""

from __future__ import annotations

import agsel
from tests.cases import message_of, run_cases
from tests.zero.guards_ranks import engine_of
from tests.zero.scenario import Scenario


def super_offload() -> str | None:
    zero = {"offload_optimizer": {"device": "cpu", "super_offload": True, "ratio": 0.9, "pin_memory": False}}
    engine = engine_of(Scenario(stage=3, dtype="bf16", zero=zero))
    return message_of(ValueError, lambda: agsel.attach(engine, agsel.FullFineTuning()))


if __name__ == "__main__":
    run_cases({"super_offload": super_offload})
