"""FreezeOut against one AdamW over all weights, whose lower layers are frozen one after another."""

from __future__ import annotations

import math
from typing import Any

import pytest

from agsel.errors import UserError
from agsel.policies import FreezeOut
from tests.policies.running import layers, run, started
from tests.policies.training import TOLERANCE, FreezingLoop, assert_same_weights, attached, moved_blocks, train
from tests.tiny import tiny_batch, tiny_model

LAYERS, STEPS = 4, 14


def steps_of(layer: int, layers: int, steps: int, power: float, most: float) -> float:
    """After how many steps a layer is frozen: those in which the front of frozen ones has come to its middle."""
    middle = (layer + 0.5) / layers
    return math.inf if layer == layers - 1 or middle > most else steps * middle ** (1 / power)


def trained_at(step: int, power: float, most: float) -> set[str]:
    """The layers that are not frozen yet."""
    return {f"layers.{layer}" for layer in range(LAYERS) if step < steps_of(layer, LAYERS, STEPS, power, most)}


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize(("power", "most"), [(1.0, 1.0), (2.0, 1.0), (1.5, 0.6)])
def test_equals_the_loop_that_freezes_layers(power: float, most: float) -> None:
    losses, selected = [], []
    policy = FreezeOut(freeze_power=power, freeze_most=most, freeze_steps=STEPS)
    with attached(policy, tiny_model()) as (engine, selection):
        for step in range(STEPS):
            losses.append(train(engine, tiny_batch(step, 0, 0)))
            selected.append(list(selection.last.selected))
        plain = FreezingLoop(tiny_model())
        assert losses == pytest.approx(
            plain.train([trained_at(step, power, most) for step in range(STEPS)]), rel=0, abs=TOLERANCE
        )
        assert_same_weights(engine.module, plain.model)
    names = [f"layers.{layer}" for layer in range(LAYERS)]
    assert moved_blocks(plain.model, tiny_model()) == set(names)
    lowest = LAYERS if most == 1 else 3
    assert {tuple(blocks) for blocks in selected} == {tuple(names[first:]) for first in range(lowest)}


@pytest.mark.parametrize(("power", "most"), [(0.5, 1.0), (1.0, 0.3), (1.75, 1.0), (2.0, 0.01), (1.5, 0.6), (3.0, 1.0)])
@pytest.mark.parametrize(("number", "steps"), [(1, 7), (2, 50), (16, 90), (30, 564), (80, 40)])
def test_each_layer_is_trained_until_the_front_has_come_to_its_middle(
    power: float, most: float, number: int, steps: int
) -> None:
    policy = started(FreezeOut(freeze_power=power, freeze_most=most, freeze_steps=steps), number)
    for step, (plan, chosen) in enumerate(run(policy, steps)):
        still = tuple(layer for layer in range(number) if step < steps_of(layer, number, steps, power, most) - 1e-9)
        assert chosen == still
        assert plan.trainable == set(still)
        assert plan.kind == "exploit"
    assert policy.counts == sorted(policy.counts)


@pytest.mark.parametrize(
    ("settings", "share"),
    [
        ({}, 0.656),
        ({"freeze_most": 1.0, "freeze_power": 1.0}, 1 / 2),
        ({"freeze_most": 1.0, "freeze_power": 4.0}, 4 / 5),
        ({"freeze_most": 0.5, "freeze_power": 1.0}, 1 - (0.5 - 0.5**2 / 2)),
    ],
)
def test_the_remark_tells_how_much_is_trained(settings: dict[str, Any], share: float) -> None:
    policy = started(FreezeOut(**settings, freeze_steps=500), 50)
    said = policy.remark(500)
    run(policy, 500)
    trained = sum(policy.counts) / 500
    left = len(policy.plan().trainable)
    assert said is not None
    assert said.startswith(f"50 blocks at first, {trained:.1f} on average, {left} in the end (--freeze_power, ")
    assert trained == pytest.approx(50 * share, rel=0.01)


@pytest.mark.parametrize(
    ("number", "settings"),
    [
        (30, {"freeze_steps": 10_000}),
        (24, {"freeze_steps": 20, "freeze_most": 0.02}),
        (2, {"freeze_steps": 20, "freeze_power": 40.0}),  # the first would be frozen after the last step
    ],
)
def test_a_run_that_freezes_nothing_says_so(number: int, settings: dict[str, Any]) -> None:
    policy = started(FreezeOut(**settings), number)
    said = policy.remark(20)
    assert said is not None
    assert said.startswith("no block is frozen in this run")
    assert [chosen for _, chosen in run(policy, 20)] == [tuple(range(number))] * 20


def test_one_block_is_never_frozen_and_nothing_is_said() -> None:
    policy = started(FreezeOut(freeze_steps=10), 1)
    assert policy.remark(20) is None
    assert [chosen for _, chosen in run(policy, 20)] == [(0,)] * 20


@pytest.mark.parametrize("power", [2.0, 1e300])
@pytest.mark.parametrize(("most", "rest"), [(1.0, (3,)), (0.5, (2, 3))])
def test_after_its_steps_the_highest_layers_go_on(power: float, most: float, rest: tuple[int, ...]) -> None:
    policy = started(FreezeOut(freeze_power=power, freeze_most=most, freeze_steps=3), 4)
    assert [chosen for _, chosen in run(policy, 6)][3:] == [rest] * 3


def test_steps_left_open_become_those_of_the_run() -> None:
    policy = FreezeOut()
    with pytest.raises(UserError, match="freeze_steps is not given"):
        policy.start(layers(4))
    policy.complete(epoch_steps=10, run_steps=30)
    assert policy.freeze_steps == 30
    policy.complete(epoch_steps=10, run_steps=90)
    assert policy.freeze_steps == 90
    given = FreezeOut(freeze_steps=12)
    given.complete(epoch_steps=10, run_steps=30)
    assert given.freeze_steps == 12


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        *(
            ({"freeze_power": float(power)}, "a number above 0, .*--freeze_power")
            for power in ("0", "-1", "nan", "inf")
        ),
        *(
            ({"freeze_most": float(most)}, "above 0 and at most 1, .*--freeze_most")
            for most in ("0", "-1", "1.01", "nan")
        ),
        ({"freeze_steps": 0}, "freeze_steps .*--freeze_steps"),
    ],
)
def test_a_setting_out_of_range_is_refused_by_name(settings: dict[str, Any], named: str) -> None:
    with pytest.raises(UserError, match=named):
        FreezeOut(**settings)


@pytest.mark.parametrize("planned", [False, True], ids=["between steps", "after plan"])
def test_a_longer_run_that_goes_on_thaws_layers_at_once(planned: bool) -> None:
    """A checkpoint has the plan of the step after it, by the schedule of the shorter run."""
    policy = started(FreezeOut(freeze_steps=10), 5)
    run(policy, 9)
    if planned:
        assert policy.plan().trainable == {3, 4}
    longer = started(FreezeOut(freeze_steps=90), 5)
    longer.load_state_dict(policy.state_dict())
    assert longer.is_planned == planned
    assert longer.plan().trainable == {0, 1, 2, 3, 4}
    assert longer.counts == policy.counts
