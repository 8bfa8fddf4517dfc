"""What the engine does beside forward, backward and step."""

from __future__ import annotations

import pytest
import torch

import agsel
from agsel.low_rank import FusedLinear
from agsel.planning.memory import Planner, meta_model
from agsel.planning.rehearsal import Workload, ZeroSettings, rehearsal
from agsel.planning.shapes import MODEL_SHAPES
from tests.test_recomputation import kept_inputs
from tests.zero.scenario import Scenario, start_engine

pytestmark = pytest.mark.usefixtures("one_rank")


def test_no_gradient_outlives_zero_grad() -> None:
    engine, _ = start_engine(Scenario(stage=1, blocks="layers"))
    trained = [parameter for parameter in engine.module.parameters() if parameter.requires_grad]
    assert trained
    for parameter in trained:
        parameter.grad = torch.ones_like(parameter)
    engine.zero_grad()
    assert [parameter.grad for parameter in trained] == [None] * len(trained)
    engine.destroy()


def test_widest_activations_are_not_kept_while_the_engine_lives() -> None:
    engine, _ = start_engine(Scenario(stage=1, blocks="layers", policy=agsel.FullFineTuning))
    model = engine.module
    assert not any(kept_inputs(model))
    engine.destroy()
    assert all(kept_inputs(model))


def test_the_plan_knows_that_widest_activations_are_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    work = Workload(zero=ZeroSettings(stage=1), ranks=1, micro_batch=2, sequence=64)

    def activations() -> int:
        plan = Planner(meta_model(MODEL_SHAPES["tiny"]()), work).plan(2, ("explore", "full"))
        assert plan.steps["full"].parts["activations"] > 0
        stock.append(plan.steps["full"].parts["activations"])
        return plan.steps["explore"].parts["activations"]

    stock: list[int] = []
    recomputed = activations()
    monkeypatch.setattr(rehearsal, "recompute_inputs", lambda _: [])
    assert recomputed < activations()
    assert stock[0] == stock[1]


def test_adapters_are_fused() -> None:
    engine, _ = start_engine(Scenario(stage=1, blocks="layers", adapters="lora"))
    adapted = [module for module in engine.module.modules() if hasattr(module, "lora_A")]
    assert adapted
    assert {type(module) for module in adapted} == {FusedLinear}
    engine.destroy()
