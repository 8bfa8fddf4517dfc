"""Run a policy without a model: norms that are the same in every run, and what the policy then chose."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from itertools import combinations, permutations
from typing import TypeVar

import scipy.stats

from agsel.policies import BlockInfo, Plan, Policy

AnyPolicy = TypeVar("AnyPolicy", bound=Policy)
Outcome = TypeVar("Outcome", bound=Hashable)
BLOCKS = 12
SIGNIFICANCE = 1e-3
"""Seeds are fixed: a chi-square test that passes once passes until numpy changes its streams."""


def layers(number: int) -> list[BlockInfo]:
    return [BlockInfo(f"layers.{index}", 100) for index in range(number)]


def started(policy: AnyPolicy, blocks: int = BLOCKS) -> AnyPolicy:
    policy.start(layers(blocks))
    return policy


def norms_of(step: int, blocks: int = BLOCKS) -> dict[int, float]:
    generator = random.Random(step)
    return {block: generator.random() for block in range(blocks)}


def commit(policy: Policy, norms: Mapping[int, float]) -> tuple[int, ...]:
    """The blocks that the step updates, ascending."""
    return tuple(sorted(policy.commit(norms).blocks))


def run(policy: Policy, steps: int) -> list[tuple[Plan, tuple[int, ...]]]:
    """Plan and selection of each step."""
    return [(policy.plan(), commit(policy, norms_of(policy.step, policy.number_of_blocks))) for _ in range(steps)]


def frequencies_from(policy: Policy, counts: list[int], draws: int) -> Counter[tuple[int, ...]]:
    """How often each set is selected from these very counts."""
    chosen: Counter[tuple[int, ...]] = Counter()
    for _ in range(draws):
        policy.counts = list(counts)
        chosen[commit(policy, dict.fromkeys(range(len(counts)), 0.0))] += 1
    return chosen


def sets_of(blocks: int, size: int) -> list[tuple[int, ...]]:
    return list(combinations(range(blocks), size))


def probability_of_order(order: Sequence[int], weights: Sequence[float]) -> float:
    """P(drawing these one after another without replacement, each by its weight among those that remain)."""
    remaining, probability = sum(weights), 1.0
    for block in order:
        probability *= weights[block] / remaining
        remaining -= weights[block]
    return probability


def probability_of_set(chosen: Sequence[int], weights: Sequence[float]) -> float:
    """P(drawing these in any order)."""
    return sum(probability_of_order(order, weights) for order in permutations(chosen))


def assert_drawn_from(observed: Counter[Outcome], probabilities: dict[Outcome, float]) -> None:
    """Chi-square test of what was observed against the probability of every possible outcome."""
    assert observed.keys() <= probabilities.keys()
    draws = observed.total()
    expected = [draws * probability for probability in probabilities.values()]
    assert min(expected) >= 5, "too few draws for a chi-square test"
    test = scipy.stats.chisquare([observed[key] for key in probabilities], expected)
    assert test.pvalue > SIGNIFICANCE, test
