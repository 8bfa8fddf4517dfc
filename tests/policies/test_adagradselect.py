"""The probabilities of AdaGradSelect: ε along the schedule, and which sets Dirichlet(counts + δ) selects."""

from __future__ import annotations

import math
from collections import Counter
from typing import Literal

import numpy as np
import pytest
import scipy.integrate
import scipy.stats

from agsel.policies import AdaGradSelect
from tests.policies.running import (
    SIGNIFICANCE,
    assert_drawn_from,
    frequencies_from,
    norms_of,
    probability_of_set,
    run,
    sets_of,
    started,
)

DRAWS = 10_000


def exploiting(
    k: int, blocks: int, delta: float, draw: Literal["topk", "sample"] = "topk", seed: int = 0
) -> AdaGradSelect:
    policy = AdaGradSelect(fraction=k / blocks, explore_steps=0, dirichlet_delta=delta, draw=draw, seed=seed)
    return started(policy, blocks)


def epsilon_at(step: int, steps: int, start: float, end: float) -> float:
    """ε_t by interpolating its logarithm."""
    share = step / steps
    return math.exp((1 - share) * math.log(start) + share * math.log(end))


@pytest.mark.parametrize(("start", "end"), [(1.0, 0.05), (0.9, 0.3), (0.5, 0.5)])
def test_epsilon_follows_its_formula(start: float, end: float) -> None:
    policy = started(AdaGradSelect(fraction=0.3, explore_steps=10, epsilon_start=start, epsilon_end=end))
    by_step = []
    for step in range(15):
        by_step.append(policy.epsilon)
        policy.commit(norms_of(step))
    assert by_step[:10] == pytest.approx([epsilon_at(step, 10, start, end) for step in range(10)], rel=1e-12)
    assert by_step[0] == start
    assert by_step[5] == pytest.approx(math.sqrt(start * end), rel=1e-12)
    assert by_step[10:] == [0.0] * 5


def test_epsilon_of_one_always_explores() -> None:
    policy = AdaGradSelect(fraction=0.3, explore_steps=500, epsilon_start=1.0, epsilon_end=1.0)
    assert all(plan.kind == "explore" for plan, _ in run(started(policy), 500))


@pytest.mark.parametrize("explore_steps", [0, 1, 20])
def test_after_the_phase_nothing_explores(explore_steps: int) -> None:
    policy = started(AdaGradSelect(fraction=0.3, explore_steps=explore_steps, epsilon_end=1.0))
    assert [plan.kind == "explore" for plan, _ in run(policy, 100)] == [step < explore_steps for step in range(100)]


def test_exploring_is_as_frequent_as_epsilon_says() -> None:
    """Chi-square over ten parts of the schedule, 1000 steps each."""
    start, end = 0.95, 0.1
    policy = AdaGradSelect(fraction=0.3, explore_steps=DRAWS, epsilon_start=start, epsilon_end=end, seed=3)
    explored = np.array([plan.kind == "explore" for plan, _ in run(started(policy), DRAWS)]).reshape(10, -1).sum(axis=1)
    epsilon = np.array([epsilon_at(step, DRAWS, start, end) for step in range(DRAWS)]).reshape(10, -1)
    statistic = ((explored - epsilon.sum(axis=1)) ** 2 / (epsilon * (1 - epsilon)).sum(axis=1)).sum()
    assert scipy.stats.chi2.sf(statistic, df=10) > SIGNIFICANCE


def probability_of_largest(chosen: tuple[int, ...], alpha: list[float]) -> float:
    """P(these are the largest components of Dirichlet(alpha)), by quadrature over the smallest of them.

    Components of a Dirichlet draw are ordered as the independent Gamma(alpha_i) draws that it normalises.
    """
    gammas = [scipy.stats.gamma(a) for a in alpha]

    def density(log_smallest: float) -> float:
        x = math.exp(log_smallest)
        below = math.prod(gammas[i].cdf(x) for i in range(len(alpha)) if i not in chosen)
        above = {i: gammas[i].sf(x) for i in chosen}
        return sum(x * gammas[i].pdf(x) * below * math.prod(above[j] for j in chosen if j != i) for i in chosen)

    return scipy.integrate.quad(density, -60, 6, limit=400, epsabs=1e-8)[0]


def probability_of_sampling(chosen: tuple[int, ...], alpha: list[float]) -> float:
    """P(drawing these without replacement from p ~ Dirichlet(alpha)), as if from alpha itself.

    What remains of p after a draw is, rescaled, Dirichlet again and independent of what was drawn; so each draw takes
    component i with its mean, alpha_i over the sum of the remaining alphas.
    """
    return probability_of_set(chosen, alpha)


CASES = [([0, 0, 0, 0], 1, 1.0), ([3, 0, 1, 6], 1, 0.5), ([3, 0, 1, 6], 2, 1.0), ([5, 2, 2, 3, 4], 3, 0.3)]
REFERENCES = {"topk": probability_of_largest, "sample": probability_of_sampling}


@pytest.mark.parametrize("draw", ["topk", "sample"])
@pytest.mark.parametrize(("counts", "k", "delta"), CASES)
def test_sets_are_drawn_with_their_exact_probabilities(
    draw: Literal["topk", "sample"], counts: list[int], k: int, delta: float
) -> None:
    blocks = len(counts)
    alpha = [count + delta for count in counts]
    probabilities = {chosen: REFERENCES[draw](chosen, alpha) for chosen in sets_of(blocks, k)}
    assert sum(probabilities.values()) == pytest.approx(1, abs=1e-6), "the reference is no distribution"
    scale = 1 / sum(probabilities.values())
    probabilities = {chosen: probability * scale for chosen, probability in probabilities.items()}
    assert_drawn_from(frequencies_from(exploiting(k, blocks, delta, draw), counts, DRAWS), probabilities)


def test_the_two_ways_to_draw_differ() -> None:
    """The tests above tell one from the other: each fails on the other's draws."""
    counts, k, delta = CASES[2]
    alpha = [count + delta for count in counts]
    sampled = frequencies_from(exploiting(k, 4, delta, "sample"), counts, DRAWS)
    expected = [DRAWS * probability_of_largest(chosen, alpha) for chosen in sets_of(4, k)]
    assert scipy.stats.chisquare([sampled[key] for key in sets_of(4, k)], expected, sum_check=False).pvalue < 1e-6


@pytest.mark.parametrize("draw", ["topk", "sample"])
@pytest.mark.parametrize("delta", [1e-8, 1e-3, 1.0, 1e6])
def test_equal_counts_give_equal_chances_whatever_delta(draw: Literal["topk", "sample"], delta: float) -> None:
    """The components of Dirichlet(1e-3) underflow to 0 more often than not; the first blocks must not profit."""
    observed = frequencies_from(exploiting(2, 5, delta, draw), [0] * 5, DRAWS)
    assert_drawn_from(observed, dict.fromkeys(sets_of(5, 2), 0.1))


def test_delta_near_zero_locks_on_to_the_counted() -> None:
    assert frequencies_from(exploiting(2, 5, 1e-9), [0, 40, 0, 40, 0], 500) == Counter({(1, 3): 500})


def test_large_counts_are_followed() -> None:
    """k blocks counted far more often than the others are selected for ever: the lock-on that the paper's rule has."""
    assert frequencies_from(exploiting(2, 5, 1.0), [5, 400, 5, 400, 5], 500) == Counter({(1, 3): 500})


@pytest.mark.parametrize(
    ("k", "blocks", "draw", "keeps_to_one"),
    [(1, 12, "topk", True), (1, 12, "sample", False), (2, 12, "topk", False), (1, 1, "topk", False)],
)
def test_a_draw_that_keeps_to_one_block_of_many_is_remarked(
    k: int, blocks: int, draw: Literal["topk", "sample"], keeps_to_one: bool
) -> None:
    policy = exploiting(k, blocks, delta=1.0, draw=draw)
    policy.counts = [20, *[1] * (blocks - 1)]
    remark = policy.remark(run_steps=1000)
    assert (remark is not None) == keeps_to_one
    run(policy, 1000)
    assert (blocks > 1 and max(policy.counts) > 0.9 * sum(policy.counts)) == keeps_to_one
    assert remark is None or "of 12 blocks one may have nearly all turns: raise --select_fraction" in remark
