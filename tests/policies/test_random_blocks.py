"""RandomBlocks: every set equally often, and a new one exactly every `every` applied steps."""

from __future__ import annotations

from collections import Counter

import pytest

from agsel.policies import RandomBlocks
from tests.policies.running import assert_drawn_from, norms_of, run, sets_of, started

DRAWS = 10_000


@pytest.mark.parametrize(("blocks", "k"), [(4, 1), (5, 2), (6, 3)])
def test_every_set_is_drawn_equally_often(blocks: int, k: int) -> None:
    policy = started(RandomBlocks(fraction=k / blocks), blocks)
    sets = sets_of(blocks, k)
    assert_drawn_from(Counter(selected for _, selected in run(policy, DRAWS)), dict.fromkeys(sets, 1 / len(sets)))


@pytest.mark.parametrize("every", [1, 2, 7])
def test_a_set_is_held_for_its_steps(every: int) -> None:
    """With 40 of 80 blocks, two draws in a row never are the same by chance."""
    selected = [chosen for _, chosen in run(started(RandomBlocks(fraction=0.5, every=every), 80), 20 * every)]
    changes = [step for step in range(1, len(selected)) if selected[step] != selected[step - 1]]
    assert changes == list(range(every, 20 * every, every))


def test_held_sets_are_independent() -> None:
    """Pairs of successive sets are uniform too: the second draw does not avoid or repeat the first."""
    selected = [chosen for _, chosen in run(started(RandomBlocks(fraction=0.5, every=2, seed=1), 4), 2 * DRAWS)][::2]
    pairs = Counter(zip(selected[::2], selected[1::2], strict=True))
    keys = [(first, second) for first in sets_of(4, 2) for second in sets_of(4, 2)]
    assert_drawn_from(pairs, dict.fromkeys(keys, 1 / len(keys)))


def test_only_applied_steps_count() -> None:
    """A skipped step is planned again without being resolved: it does not shorten the time that a set is held."""
    policy = started(RandomBlocks(fraction=0.5, every=3), 80)
    held = []
    for step in range(9):
        for _ in range(1 + step % 2):
            plan = policy.plan()
        held.append(plan.trainable)
        policy.commit(norms_of(step, 80))
    assert held[0:3] == [held[0]] * 3
    assert held[3:6] == [held[3]] * 3
    assert len(set(held)) == 3
