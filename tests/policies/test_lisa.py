"""LISA against its authors' loop: one AdamW over all weights, and layers that are frozen and thawed."""

from __future__ import annotations

from collections import Counter

import pytest

from agsel.errors import UserError
from agsel.policies import BlockInfo, Lisa
from tests.policies.running import assert_drawn_from, layers, run, sets_of, started
from tests.policies.training import (
    AROUND_THE_LAYERS,
    TOLERANCE,
    FreezingLoop,
    assert_same_weights,
    attached,
    moved_blocks,
    train,
)
from tests.tiny import tiny_batch, tiny_model

ALWAYS = set(AROUND_THE_LAYERS.values())
EVERY, STEPS = 4, 18
DRAWS = 5_000


@pytest.mark.usefixtures("one_rank")
def test_equals_the_loop_that_freezes_layers() -> None:
    losses, selected = [], []
    with attached(Lisa(fraction=0.5, every=EVERY, seed=2), tiny_model(), "all") as (engine, selection):
        for step in range(STEPS):
            assert ALWAYS < set(selection.resident) < set(selection.blocks)
            losses.append(train(engine, tiny_batch(step, 0, 0)))
            selected.append(set(selection.last.selected))
        turns = [selected[step] - ALWAYS for step in range(0, STEPS, EVERY)]
        assert selected == [ALWAYS | turns[step // EVERY] for step in range(STEPS)]
        assert {len(turn) for turn in turns} == {2}
        assert len(set(map(frozenset, turns))) > 1
        assert selection.counts == Counter(block for blocks in selected for block in blocks)
        plain = FreezingLoop(tiny_model())
        assert losses == pytest.approx(plain.train(selected), rel=0, abs=TOLERANCE)
        assert_same_weights(engine.module, plain.model)
        assert moved_blocks(plain.model, tiny_model()) == ALWAYS.union(*turns)


def everything(number_of_layers: int) -> list[BlockInfo]:
    """Layers and what is around them, in forward order."""
    around = [BlockInfo(name, 50) for name in ("embed", "final_norm", "head")]
    return [around[0], *layers(number_of_layers), *around[1:]]


@pytest.mark.parametrize(("fraction", "number", "gamma"), [(0.5, 4, 2), (0.3, 10, 3), (0.24, 4, 1), (1.0, 3, 3)])
def test_the_share_is_of_the_layers_alone(fraction: float, number: int, gamma: int) -> None:
    policy = Lisa(fraction=fraction)
    policy.start(everything(number))
    around = {0, number + 1, number + 2}
    for plan, chosen in run(policy, 60):
        assert set(chosen) == plan.trainable
        assert around <= set(chosen)
        assert len(chosen) == gamma + 3
    assert policy.pinned == around
    assert policy.blocks_per_step == gamma + 3
    assert policy.counts[0] == policy.counts[-1] == 60


def test_layers_are_held_for_twenty_steps() -> None:
    """With 40 of 80 layers, two draws in a row never are the same by chance."""
    chosen = [chosen for _, chosen in run(started(Lisa(fraction=0.5), 80), 100)]
    assert [step for step in range(1, 100) if chosen[step] != chosen[step - 1]] == [20, 40, 60, 80]


def test_pairs_of_turns_are_uniform() -> None:
    """So are the sets, and no turn looks at the one before."""
    policy = Lisa(fraction=0.5, every=1, seed=1)
    policy.start(everything(4))
    turns = [tuple(sorted(set(chosen) - {0, 5, 6})) for _, chosen in run(policy, 2 * DRAWS)]
    sets = [tuple(block + 1 for block in chosen) for chosen in sets_of(4, 2)]
    pairs = [(first, second) for first in sets for second in sets]
    assert_drawn_from(Counter(zip(turns[::2], turns[1::2], strict=True)), dict.fromkeys(pairs, 1 / len(pairs)))


def test_over_adapters_only_layers_are_drawn() -> None:
    policy = started(Lisa(fraction=0.5, every=1), 4)
    observed = Counter(chosen for _, chosen in run(policy, DRAWS))
    assert policy.pinned == frozenset()
    assert_drawn_from(observed, dict.fromkeys(sets_of(4, 2), 1 / 6))


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"fraction": 0.0}, "--select_fraction"),
        ({"fraction": 1.5}, "--select_fraction"),
        ({"every": 0}, "--select_every"),
        ({"seed": -1}, "--selection_seed"),
    ],
)
def test_a_setting_out_of_range_is_refused_by_name(settings: dict[str, float], named: str) -> None:
    with pytest.raises(UserError, match=named):
        Lisa(**settings)


def test_a_share_below_one_layer_is_one_layer() -> None:
    policy = Lisa(fraction=1e-6)
    policy.start(everything(7))
    assert {len(chosen) for _, chosen in run(policy, 60)} == {4}
