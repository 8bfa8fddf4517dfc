"""Chosen elements are those of a dense reference in one process, whatever the number of ranks and ZeRO's stage."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import nn

from tests.cases import Results, launch_cases
from tests.elements.choosing_ranks import (
    CHOICES,
    KINDS,
    METHODS,
    SHAPES,
    WHOLE,
    Choice,
    budgets_of,
    chosen,
    memory,
    model_of,
    numbers,
    rows_of,
    shares,
    summed_loss,
)
from tests.elements.test_largest import sorted_places
from tests.tiny import tiny_model

Places = dict[str, list[int]]
Scores = dict[str, NDArray[Any]]
RANKS = (2, pytest.param(4, marks=pytest.mark.slow))
CLOSE = 1e-5
"""Scores that differ by less, relatively, may change places by the rounding of sums."""


@pytest.fixture(scope="module", params=RANKS, ids=lambda ranks: f"{ranks}-ranks")
def ranks(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[Results]:
    return launch_cases("tests/elements/choosing_ranks.py", tmp_path_factory.mktemp("choosing"), ranks=request.param)


@pytest.fixture(scope="module")
def expected() -> dict[str, tuple[Places, bool]]:
    """By choice: the elements, and whether those at the limit are far apart, or equal."""
    return {name: reference(choice) for name, choice in CHOICES.items()}


def reference(choice: Choice) -> tuple[Places, bool]:
    """Full gradients, the papers' scores, and stable sorts."""
    scores, numel = dense_scores(choice)
    budget = max(1, round(choice.density * numel))
    if choice.method != "gem":
        return first_of_sorted(scores, budget)
    places, clear = {}, True
    for name, own in gem_budgets(scores, budget).items():
        if own:
            one, is_clear = first_of_sorted({name: scores[name]}, own)
            places |= one
            clear &= is_clear
    return places, clear


def dense_scores(choice: Choice) -> tuple[Scores, int]:
    """fp64 scores by weight, and the number of weights in linear layers; bf16 has a gradient for each batch."""
    model = model_of(replace(choice, checkpointing=False))
    model.eval().requires_grad_(True)
    exact = choice.dtype == torch.float32
    if exact:
        model.double()
    linear = {
        f"{name}.weight": module.weight
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and "layers." in name
    }
    sums = {name: np.zeros(weight.numel()) for name, weight in linear.items()}
    loss = summed_loss(model)
    for batch in rows_of(choice):
        model.zero_grad()
        loss(batch).backward()
        for name, weight in linear.items():
            if weight.grad is not None:
                sums[name] += weight.grad.double().flatten().numpy()
    scores = {}
    for name, weight in linear.items():
        if choice.method == "gem" and not name.endswith(("q_proj.weight", "v_proj.weight")):
            continue
        scores[name] = np.abs(sums[name])
        if choice.method != "saft":
            scores[name] = scores[name] / (np.abs(weight.detach().double().flatten().numpy()) + 1e-8)
    return scores, sum(weight.numel() for weight in linear.values())


def gem_budgets(scores: Scores, budget: int) -> dict[str, int]:
    """Entropy x norm of each, the largest remainders one more."""
    weights = []
    for score in scores.values():
        p = score / score.sum()
        weights.append(np.linalg.norm(score) * -(p * np.log(p + 1e-8)).sum())
    exact = budget * np.array(weights) / np.sum(weights)
    own = np.floor(exact).astype(int)
    own[np.argsort(-(exact - own), kind="stable")[: budget - own.sum()]] += 1
    assert own.sum() == budget
    return dict(zip(scores, own.tolist(), strict=True))


def first_of_sorted(scores: Scores, budget: int) -> tuple[Places, bool]:
    flat = np.concatenate(list(scores.values()))
    order = np.argsort(-flat, kind="stable")
    taken = np.zeros(len(flat), dtype=bool)
    taken[order[:budget]] = True
    pieces = np.split(taken, np.cumsum([len(score) for score in scores.values()])[:-1])
    places = {name: np.flatnonzero(piece).tolist() for name, piece in zip(scores, pieces, strict=True) if piece.any()}
    if budget == len(flat):
        return places, True
    last, following = flat[order[budget - 1 : budget + 1]]
    return places, last == following or last - following > CLOSE * last


def places_of(result: dict[str, Any]) -> Places:
    return {name: indices.tolist() for name, indices in result["indices"].items()}


@pytest.mark.parametrize("name", CHOICES)
def test_ranks_choose_what_the_reference_does(
    ranks: list[Results], expected: dict[str, tuple[Places, bool]], name: str
) -> None:
    places, clear = expected[name]
    assert clear, "the reference itself is not clear: change the density"
    for rank in ranks:
        assert places_of(rank[name]) == places


@pytest.mark.parametrize("name", WHOLE)
def test_one_process_chooses_what_the_reference_does(expected: dict[str, tuple[Places, bool]], name: str) -> None:
    result = chosen(WHOLE[name])
    assert places_of(result) == expected[name][0]
    assert not result["changed"]
    assert not result["hooks"]


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize("name", ["gallop-ties-partitioned", "gem-partitioned"])
def test_one_rank_chooses_of_a_partitioned_model(expected: dict[str, tuple[Places, bool]], name: str) -> None:
    assert places_of(chosen(CHOICES[name])) == expected[name][0]


@pytest.mark.parametrize("name", CHOICES)
def test_the_model_stays_as_it_was(ranks: list[Results], name: str) -> None:
    for rank in ranks:
        assert not rank[name]["changed"]
        assert not rank[name]["hooks"]


@pytest.mark.parametrize("name", CHOICES)
def test_density_is_exact(ranks: list[Results], name: str) -> None:
    choice = CHOICES[name]
    linear = {f"{n}.weight": m.weight for n, m in model_of(choice).named_modules() if isinstance(m, nn.Linear)}
    number = max(1, round(choice.density * sum(weight.numel() for n, weight in linear.items() if "layers." in n)))
    for rank in ranks:
        result = rank[name]
        assert sum(indices.numel() for indices in result["indices"].values()) == number
        assert {indices.dtype for indices in result["indices"].values()} == {torch.int32}
        assert result["about"] == {"method": choice.method, "density": choice.density}
        assert result["shapes"] == {n: tuple(linear[n].shape) for n in result["indices"]}


@pytest.mark.parametrize("name", ["gallop-ties", "saft-ties", "gem-ties", "routed-all"])
def test_ties_are_really_there(name: str) -> None:
    """At the limit some elements of score zero are chosen, and others are not, in more than one matrix if can be."""
    scores, _ = dense_scores(WHOLE[name])
    places, _ = reference(WHOLE[name])
    zeros = {weight: set(np.flatnonzero(score == 0).tolist()) for weight, score in scores.items()}
    taken = {weight: len(zeros[weight] & set(places.get(weight, ()))) for weight in scores}
    assert any(0 < count < len(zeros[weight]) for weight, count in taken.items())


@pytest.mark.parametrize("method", METHODS)
def test_methods_differ(expected: dict[str, tuple[Places, bool]], method: str) -> None:
    """So that none passes for another."""
    assert sum(expected[other][0] == expected[method][0] for other in METHODS) == 1


def test_rows_and_batch_sizes_count(expected: dict[str, tuple[Places, bool]]) -> None:
    """So that a rank whose last batches are left out does not pass."""
    assert expected["five"][0] != expected["gallop"][0]


def test_gradients_of_one_layer_at_a_time(ranks: list[Results]) -> None:
    layer = [m.weight.numel() for m in tiny_model().model.layers[0].modules() if isinstance(m, nn.Linear)]
    for result in (memory(), *(rank["memory"] for rank in ranks)):
        assert max(layer) < result["most"] <= sum(layer) + max(layer)
        assert not result["left"]


def test_shares_are_equal_parts(ranks: list[Results]) -> None:
    for name, shape in SHAPES.items():
        numel, longest = math.prod(shape), math.ceil(math.prod(shape) / len(ranks))
        lengths = [rank["shares"][name][0] for rank in ranks]
        assert sum(lengths) == numel
        assert lengths == [max(0, min(longest, numel - longest * rank)) for rank in range(len(ranks))]
        assert {rank["shares"][name][1] for rank in ranks} == {"torch.float32"}
    assert {name: (math.prod(shape), "torch.float32") for name, shape in SHAPES.items()} == shares()


def test_largest_of_numbers_on_ranks(ranks: list[Results]) -> None:
    for kind in KINDS:
        vectors = numbers(kind)
        for number, budget in enumerate(budgets_of(vectors)):
            together = [
                [place for own in places for place in own]
                for places in zip(*(r["largest"][kind][number] for r in ranks), strict=True)
            ]
            assert together == sorted_places(vectors, budget), (kind, budget)


def test_a_rank_without_rows(ranks: list[Results]) -> None:
    for rank in ranks:
        assert "a rank has no samples" in rank["nothing on a rank"]


@pytest.mark.parametrize("case", ["not a number", "not a number, partitioned"])
def test_a_gradient_that_is_not_finite(ranks: list[Results], case: str) -> None:
    for rank in ranks:
        assert "the gradient of model.layers.0.self_attn.q_proj.weight is not finite" in rank[case]
