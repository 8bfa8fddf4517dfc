"""What the engine does beside forward, backward and step."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import pytest
import torch

import agsel
from agsel.low_rank import FusedLinear
from agsel.planning.memory import Planner, meta_model
from agsel.planning.rehearsal import Workload, ZeroSettings, rehearsal
from agsel.planning.shapes import MODEL_SHAPES
from agsel.policies import Update
from tests.test_recomputation import kept_inputs
from tests.tiny import tiny_batch
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


def test_an_early_choice_goes_by_norms_of_the_mean_gradient() -> None:
    """Which, of micro-batches that are all alike, the first one has as all have."""

    class Seeing(agsel.TopK):
        def choose(self, norms: Mapping[int, float]) -> Update:
            self.seen = dict(norms)
            return super().choose(norms)

    scenario = Scenario(
        stage=2, accumulation=3, blocks="layers", policy=partial(Seeing, fraction=0.5), choose_early=True
    )
    engine, selection = start_engine(scenario)
    ids = tiny_batch(0, 0, 0).to(engine.device)
    for _ in range(3):
        engine.backward(engine(input_ids=ids, labels=ids).loss)
        engine.step()
    last = selection.last
    assert len(last.selected) == len(last.norms) > 1
    seen = {name: selection.policy.seen[selection.blocks.index(name)] for name in last.norms}
    assert seen == pytest.approx(dict(last.norms), rel=1e-5)
    engine.destroy()


def test_adapters_are_fused() -> None:
    engine, _ = start_engine(Scenario(stage=1, blocks="layers", adapters="lora"))
    adapted = [module for module in engine.module.modules() if hasattr(module, "lora_A")]
    assert adapted
    assert {type(module) for module in adapted} == {FusedLinear}
    engine.destroy()
