"""IST on LoRA and DoRA adapters against a loop without PEFT, which merges the adapters into dense weights itself."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Collection
from itertools import permutations
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch.func import functional_call

from agsel.errors import UserError
from agsel.policies import Ist
from tests.policies.running import (
    assert_drawn_from,
    norms_of,
    probability_of_order,
    probability_of_set,
    sets_of,
    started,
)
from tests.policies.training import TOLERANCE, attached, block_of, train
from tests.tiny import adapted_model, tiny_batch, tiny_model
from tests.zero.scenario import ADAM

LAYERS, STEPS = 4, 50
ROWS, ROWS_OF_A_PROBE = 18, 16
SCALING, SUPPRESSION = 2 / 3, 0.25
"""`lora_alpha` by rank in `adapted_model`, and what IST multiplies it by."""
DRAWS = 10_000


def batch(step: int) -> torch.Tensor:
    """Of so few different tokens that the loss falls fast, and with it the rewards move."""
    return tiny_batch(step, 0, 0, rows=ROWS) % 3


def importance_after(scores: list[float], halves: list[Collection[int]], losses: list[float]) -> list[float]:
    """The scores after one time of suppressing: a high score is of a layer that can be missed."""
    rewards = [math.exp(-loss) for loss in losses]
    mean = sum(rewards) / len(rewards)
    slopes = [sigmoid(score) * sigmoid(-score) for score in scores]
    gains = [
        sum(reward - mean for reward, half in zip(rewards, halves, strict=True) if layer in half)
        for layer in range(len(scores))
    ]
    return [score + 10 * gain * slope for score, gain, slope in zip(scores, gains, slopes, strict=True)]


def sigmoid(value: float) -> float:
    return 1 / (1 + math.exp(-value))


class DenseAdapters:
    """The tiny model with copies of a PEFT model's adapters, merged into its weights for each forward."""

    def __init__(self, adapted: PeftModel) -> None:
        self.model = tiny_model().requires_grad_(False)
        self.adapters: dict[str, dict[str, torch.nn.Parameter]] = {}
        for name, parameter in adapted.named_parameters():
            if ".lora_" in name:
                module, _, kind = name.removeprefix("base_model.model.").partition(".lora_")
                copy = torch.nn.Parameter(parameter.detach().clone())
                self.adapters.setdefault(module, {})[kind.partition(".")[0]] = copy
        blocks = {block_of(module) for module in self.adapters}
        self.optimizers = {block: torch.optim.AdamW(self._parameters_of(block), **ADAM) for block in blocks}

    def loss(self, ids: torch.Tensor, suppressed: Collection[int] = ()) -> torch.Tensor:
        weights = {
            f"{module}.weight": self._merged(module, block_of(module) in {f"layers.{layer}" for layer in suppressed})
            for module in self.adapters
        }
        return functional_call(self.model, weights, kwargs={"input_ids": ids, "labels": ids}).loss

    def update(self, ids: torch.Tensor, blocks: Collection[str]) -> float:
        """Train the adapters of these layers; the loss before."""
        for optimizer in self.optimizers.values():
            optimizer.zero_grad()
        loss = self.loss(ids)
        loss.backward()
        for block in blocks:
            self.optimizers[block].step()
        return loss.item()

    def _merged(self, module: str, is_suppressed: bool) -> torch.Tensor:
        """W + s B A; with DoRA every row is brought to the length that is learnt for it, its own taken for constant."""
        adapter = self.adapters[module]
        scaling = SCALING * (SUPPRESSION if is_suppressed else 1)
        weight = self.model.get_submodule(module).weight + scaling * adapter["B"] @ adapter["A"]
        if "magnitude_vector" not in adapter:
            return weight
        lengths = weight.detach().norm(dim=1)
        return (adapter["magnitude_vector"] / lengths)[:, None] * weight

    def _parameters_of(self, block: str) -> list[torch.nn.Parameter]:
        return [p for module, own in self.adapters.items() if block_of(module) == block for p in own.values()]


class Heard:
    """What a policy asks for and is told, step by step."""

    def __init__(self, policy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        self.halves: dict[int, list[Collection[int]]] = {}
        self.losses: dict[int, list[float]] = {}
        observe = policy.observe

        def observed(losses: list[float]) -> None:
            probes = policy.probes()
            assert {(probe.factor, probe.rows) for probe in probes} == {(SUPPRESSION, ROWS_OF_A_PROBE)}
            self.halves[policy.step] = [probe.suppressed for probe in probes]
            self.losses[policy.step] = list(losses)
            observe(losses)

        monkeypatch.setattr(policy, "observe", observed)


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_equals_a_loop_over_merged_weights(monkeypatch: pytest.MonkeyPatch, dora: bool) -> None:
    adapted = adapted_model(dora=dora)
    dense = DenseAdapters(adapted)
    scores = [0.0] * LAYERS
    with attached(Ist(seed=5), adapted) as (engine, selection):
        heard = Heard(selection.policy, monkeypatch)
        for step in range(STEPS):
            loss = train(engine, batch(step))
            if step in heard.halves:
                halves = heard.halves[step]
                with torch.no_grad():
                    losses = [dense.loss(batch(step)[:ROWS_OF_A_PROBE], half).item() for half in halves]
                assert [len(half) for half in halves] == [LAYERS // 2] * 3
                assert len({frozenset(half) for half in halves}) == 3
                assert heard.losses[step] == pytest.approx(losses, rel=0, abs=TOLERANCE)
                scores = importance_after(scores, halves, losses)
            assert len(selection.last.selected) == LAYERS // 4
            assert loss == pytest.approx(dense.update(batch(step), selection.last.selected), rel=0, abs=TOLERANCE)
        assert list(heard.halves) == [10, 20, 30, 40]
        assert selection.policy.scores == pytest.approx(scores, rel=0, abs=10 * TOLERANCE)
        assert max(map(abs, scores)) > 1000 * TOLERANCE
        assert sum(selection.counts.values()) == STEPS * LAYERS // 4


@pytest.mark.usefixtures("one_rank")
def test_suppressing_is_without_dropout(monkeypatch: pytest.MonkeyPatch) -> None:
    adapted = adapted_model(dropout=0.5)
    with attached(Ist(), adapted) as (engine, selection):
        heard = Heard(selection.policy, monkeypatch)
        for step in range(10):
            train(engine, batch(step))
        dense = DenseAdapters(adapted)
        train(engine, batch(10))
        with torch.no_grad():
            losses = [dense.loss(batch(10)[:ROWS_OF_A_PROBE], half).item() for half in heard.halves[10]]
        assert heard.losses[10] == pytest.approx(losses, rel=0, abs=TOLERANCE)
        assert adapted.training


def step_of(policy: Ist, loss_of: Callable[[Collection[int]], float]) -> tuple[list[Collection[int]], tuple[int, ...]]:
    """The sets that the step suppresses, which have these losses, and the layers that it trains."""
    sets = [probe.suppressed for probe in policy.probes()]
    if sets:
        policy.observe([loss_of(suppressed) for suppressed in sets])
    return sets, tuple(sorted(policy.commit(norms_of(0, policy.number_of_blocks)).blocks))


def told_that_the_first_matters(layers: int, fraction: float = 0.25, seed: int = 0) -> tuple[Ist, list[float]]:
    """A policy after some suppressing, and its scores. Suppressing the first layer has cost much, the last little."""
    policy = started(Ist(fraction=fraction, seed=seed), layers)
    scores = [0.0] * layers

    def loss_of(suppressed: Collection[int]) -> float:
        return 1.0 + (0 in suppressed) - 0.5 * (layers - 1 in suppressed)

    for _ in range(61):
        sets, _ = step_of(policy, loss_of)
        if sets:
            scores = importance_after(scores, sets, [loss_of(suppressed) for suppressed in sets])
    assert scores[0] < -0.5 < 0.5 < scores[-1]
    return policy, scores


def told_nothing_new(_: Collection[int]) -> float:
    """The same loss for all sets, which leaves the scores as they are."""
    return 1.0


@pytest.mark.parametrize(("layers", "k"), [(4, 1), (4, 2), (5, 2)])
def test_layers_are_trained_by_their_importance(layers: int, k: int) -> None:
    """A layer whose suppression costs much is trained more often."""
    policy, scores = told_that_the_first_matters(layers, k / layers)
    weights = [sigmoid(-score) for score in scores]
    observed = Counter(step_of(policy, told_nothing_new)[1] for _ in range(DRAWS))
    assert_drawn_from(observed, {chosen: probability_of_set(chosen, weights) for chosen in sets_of(layers, k)})


def test_sets_to_suppress_are_drawn_by_unimportance() -> None:
    """Three different sets of one layer in three: the orders of drawing without replacement."""
    policy, scores = told_that_the_first_matters(3)
    weights = [sigmoid(score) for score in scores]
    orders: Counter[tuple[int, ...]] = Counter()
    for _ in range(DRAWS):
        if sets := step_of(policy, told_nothing_new)[0]:
            orders[tuple(layer for suppressed in sets for layer in suppressed)] += 1
    assert orders.total() == DRAWS // 10
    assert_drawn_from(orders, {order: probability_of_order(order, weights) for order in permutations(range(3))})


def test_halves_to_suppress_are_drawn_by_unimportance() -> None:
    """The first of the three, which no other one restricts."""
    policy, scores = told_that_the_first_matters(4)
    weights = [sigmoid(score) for score in scores]
    halves: Counter[tuple[int, ...]] = Counter()
    for _ in range(2 * DRAWS):
        if sets := step_of(policy, told_nothing_new)[0]:
            assert len({frozenset(half) for half in sets}) == 3
            halves[tuple(sorted(sets[0]))] += 1
    assert_drawn_from(halves, {half: probability_of_set(half, weights) for half in sets_of(4, 2)})


def test_of_two_layers_there_are_two_sets() -> None:
    policy = started(Ist(), 2)
    for step in range(100):
        sets, _ = step_of(policy, len)
        expected = {frozenset({0}), frozenset({1})} if step % 10 == 0 and step else set()
        assert set(map(frozenset, sets)) == expected
        assert len(sets) == len(expected)


@pytest.mark.parametrize(("layers", "half"), [(3, 1), (5, 2), (9, 4)])
def test_half_of_the_layers_is_rounded_down(layers: int, half: int) -> None:
    policy = started(Ist(), layers)
    sets = [suppressed for _ in range(31) for suppressed in step_of(policy, len)[0]]
    assert [len(suppressed) for suppressed in sets] == [half] * 9


def test_asking_again_changes_nothing() -> None:
    once, often = (started(Ist(), 8) for _ in range(2))
    for _ in range(31):
        asked = [often.probes() for _ in range(3)]
        assert asked[0] == asked[1] == asked[2] == once.probes()
        assert step_of(once, sum) == step_of(often, sum)
        assert once.scores == often.scores


def test_losses_so_large_that_their_rewards_vanish_keep_the_scores_finite() -> None:
    policy = started(Ist(), 4)
    for _ in range(101):
        step_of(policy, lambda suppressed: 1e4 * (0 in suppressed))
    assert all(map(math.isfinite, policy.scores))


def test_a_loss_that_is_no_number_teaches_nothing() -> None:
    """As of rows none of whose tokens is learnt."""
    policy, scores = told_that_the_first_matters(4)
    for _ in range(20):
        step_of(policy, lambda suppressed: math.nan if 0 in suppressed else 1.0)
    assert policy.scores == pytest.approx(scores, rel=1e-12)


def test_one_layer_is_refused() -> None:
    with pytest.raises(UserError, match="layer"):
        started(Ist(), 1)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"fraction": 0.0}, "--select_fraction"),
        ({"fraction": -0.25}, "--select_fraction"),
        ({"fraction": 1.01}, "--select_fraction"),
        ({"seed": -1}, "--selection_seed"),
    ],
)
def test_a_setting_out_of_range_is_refused_by_name(settings: dict[str, float], named: str) -> None:
    with pytest.raises(UserError, match=named):
        Ist(**settings)


@pytest.mark.parametrize("fraction", [1e-6, 0.1])
def test_a_share_below_one_layer_is_one_layer(fraction: float) -> None:
    policy = started(Ist(fraction=fraction), 4)
    assert {len(step_of(policy, told_nothing_new)[1]) for _ in range(40)} == {1}


@pytest.mark.usefixtures("one_rank")
def test_a_model_without_adapters_is_refused() -> None:
    with pytest.raises(UserError, match="adapters"), attached(Ist(), tiny_model()):
        pass
