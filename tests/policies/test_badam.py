"""BAdam against a plain loop with a new AdamW for each turn, and against its authors' package."""

from __future__ import annotations

import copy
from collections import Counter
from itertools import permutations
from typing import Literal

import pytest
import torch
from badam import BlockOptimizer
from torch import nn

from agsel.errors import UserError
from agsel.policies import BAdam
from tests.policies.running import assert_drawn_from, norms_of, run, started
from tests.policies.training import (
    TOLERANCE,
    PlainLoop,
    assert_same_weights,
    attached,
    moved_blocks,
    train,
)
from tests.tiny import tiny_batch, tiny_model
from tests.zero.scenario import ADAM

LAYERS = 4
EVERY = 5
DRAWS = 6_000
Order = Literal["random", "ascending", "descending"]


def trained_with_agsel(model: nn.Module, order: Order, first: int, steps: int) -> tuple[list[float], list[str]]:
    """Losses, and the block of each step; the model is trained."""
    losses, blocks = [], []
    with attached(BAdam(every=EVERY, order=order, seed=1), model) as (engine, selection):
        for step in range(first, first + steps):
            losses.append(train(engine, tiny_batch(step, 0, 0)))
            blocks += selection.last.selected
    return losses, blocks


def trained_plainly(model: nn.Module, blocks: list[str], *, every: int = EVERY) -> list[float]:
    """Losses of a loop that makes a new optimizer every so many steps."""
    plain = PlainLoop(model)
    losses = []
    for step, block in enumerate(blocks):
        losses.append(plain.gradients(tiny_batch(step, 0, 0)))
        if step % every == 0:
            plain.start_anew(block)
        plain.update([block])
    return losses


def turns_of(blocks: list[str]) -> list[str]:
    """Whose turn it was, after a look that each turn has its full length."""
    turns = blocks[::EVERY]
    assert blocks == [block for block in turns for _ in range(EVERY)]
    return turns


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize("order", ["random", "ascending", "descending"])
def test_equals_a_loop_with_a_new_optimizer_for_each_turn(order: Order) -> None:
    """Two rounds and a turn, so that blocks with moments are met again."""
    model, plain = tiny_model(), tiny_model()
    losses, blocks = trained_with_agsel(model, order, 0, (2 * LAYERS + 1) * EVERY)
    names = [f"layers.{index}" for index in range(LAYERS)]
    turns = turns_of(blocks)
    rounds = [turns[start : start + LAYERS] for start in (0, LAYERS)]
    assert [sorted(each) for each in rounds] == [names, names]
    if order != "random":
        assert rounds == [names[:: 1 if order == "ascending" else -1]] * 2
    assert losses == pytest.approx(trained_plainly(plain, blocks), rel=0, abs=TOLERANCE)
    assert_same_weights(model, plain)
    assert moved_blocks(plain, tiny_model()) == set(names)


def test_the_loop_tells_moments_that_are_kept() -> None:
    """By far more than the tolerance of the test above, which thus would fail without the resets."""
    blocks = [f"layers.{index % LAYERS}" for index in range(2 * LAYERS) for _ in range(EVERY)]
    kept = trained_plainly(tiny_model(), blocks, every=len(blocks))
    reset = trained_plainly(tiny_model(), blocks)
    assert max(abs(one - other) for one, other in zip(kept, reset, strict=True)) > 100 * TOLERANCE


def trained_with_the_package(
    model: nn.Module, order: Order, start_block: int, steps: int
) -> tuple[list[float], nn.Module]:
    """Losses, and the model as it was when the first block's turn ended: one step early, as the package switches."""
    with pytest.warns(UserWarning, match="BAdam expect model to be loaded in fp16/bf16"):
        optimizer = BlockOptimizer(
            torch.optim.AdamW(model.parameters(), **ADAM),
            list(model.named_parameters()),
            switch_block_every=EVERY,
            switch_mode=order,
            start_block=start_block,
        )
    losses = []
    for step in range(steps):
        if step == EVERY - 1:
            switched = copy.deepcopy(model)
        ids = tiny_batch(step, 0, 0)
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses, switched


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize(("order", "last_block"), [("ascending", LAYERS - 1), ("descending", 0)])
def test_equals_the_authors_package(order: Order, last_block: int) -> None:
    """Over two switches, from the package's first switch on: its first turn, given to the last block, is too short."""
    short, steps = EVERY - 1, 3 * EVERY
    theirs = tiny_model()
    expected, ours = trained_with_the_package(theirs, order, last_block, short + steps)
    losses, blocks = trained_with_agsel(ours.requires_grad_(True), order, short, steps)
    assert len(set(turns_of(blocks))) == 3
    assert losses == pytest.approx(expected[short:], rel=0, abs=TOLERANCE)
    assert_same_weights(ours, theirs)
    assert moved_blocks(theirs, tiny_model()) == {*blocks, f"layers.{last_block}"}


def test_rounds_are_permutations_drawn_uniformly_and_independently() -> None:
    policy = started(BAdam(every=1, seed=1), 3)
    turns = [block for _, (block,) in run(policy, 6 * DRAWS)]
    rounds = [tuple(turns[start : start + 3]) for start in range(0, 6 * DRAWS, 3)]
    orders = list(permutations(range(3)))
    pairs = [(first, second) for first in orders for second in orders]
    assert_drawn_from(Counter(zip(rounds[::2], rounds[1::2], strict=True)), dict.fromkeys(pairs, 1 / 36))


@pytest.mark.parametrize("order", ["random", "ascending", "descending"])
def test_a_block_starts_anew_at_the_first_step_of_each_turn_only(order: Order) -> None:
    policy = started(BAdam(every=3, order=order), 5)
    for step in range(45):
        update = policy.commit(norms_of(step, 5))
        assert len(update.blocks) == 1
        assert update.fresh == (update.blocks if step % 3 == 0 else frozenset())


def test_of_one_block_every_turn_starts_anew() -> None:
    policy = started(BAdam(every=2), 1)
    assert [bool(policy.commit({0: 1.0}).fresh) for _ in range(6)] == [True, False] * 3


@pytest.mark.parametrize(
    ("rows", "batch", "blocks"),
    [(2_000, 4, 10), (30_000, 16, 25), (24_000, 8, 40), (400_000, 8, 24), (100, 8, 4), (9_040, 8, 11)],
)
def test_the_length_of_a_turn_follows_its_formula(rows: int, batch: int, blocks: int) -> None:
    policy = BAdam(order="ascending")
    policy.complete(epoch_steps=rows // batch, run_steps=10 * rows // batch)
    started(policy, blocks)
    fresh = [bool(policy.commit(norms_of(0, blocks)).fresh) for _ in range(201)]
    length = fresh.index(True, 1)
    assert abs(length - min(max(rows / (batch * blocks), 50), 100)) < 1
    assert [step for step, anew in enumerate(fresh) if anew] == list(range(0, 201, length))


def test_a_length_left_open_is_that_for_the_blocks_of_the_run() -> None:
    """And not for those of an earlier one, nor that of an earlier data set."""
    policy = BAdam()
    lengths = []
    for epoch_steps, blocks in ((2_400, 4), (2_400, 40), (3_600, 40)):
        policy.complete(epoch_steps, run_steps=epoch_steps)
        started(policy, blocks)
        lengths.append([bool(policy.commit(norms_of(0, blocks)).fresh) for _ in range(101)].index(True, 1))
    assert lengths == [100, 2_400 // 40, 3_600 // 40]


def test_a_length_that_is_given_is_kept() -> None:
    policy = BAdam(every=7)
    policy.complete(epoch_steps=1_000, run_steps=3_000)
    assert policy.every == 7


@pytest.mark.parametrize(("given", "expected"), [(None, 60), (80, 80)])
def test_a_round_goes_on_where_epochs_have_another_length(given: int | None, expected: int) -> None:
    """As after resuming with other batches: the open length stays, what is given counts."""
    policy = BAdam(seed=1)
    policy.complete(epoch_steps=480, run_steps=1_000)
    run(started(policy, 8), 130)
    resumed = BAdam(every=given, seed=1)
    resumed.complete(epoch_steps=800, run_steps=2_000)
    started(resumed, 8).load_state_dict(policy.state_dict())
    assert resumed.every == expected
    assert given is not None or run(resumed, 500) == run(policy, 500)


def test_a_block_whose_turn_a_new_length_enters_in_the_middle_starts_anew() -> None:
    """The fifth step, of turns of 3, is planned; the sixth is the second of a turn of 2, whose first was none."""
    policy = started(BAdam(every=3, order="ascending"), 4)
    for step in range(4):
        policy.commit(norms_of(step, 4))
    policy.plan()
    resumed = started(BAdam(every=2, order="ascending"), 4)
    resumed.load_state_dict(policy.state_dict())
    updates = [resumed.commit(norms_of(step, 4)) for step in range(4, 9)]
    assert [[*update.blocks] for update in updates] == [[1], [2], [3], [3], [0]]
    assert [bool(update.fresh) for update in updates] == [False, True, True, False, True]


def test_a_length_left_open_needs_the_length_of_an_epoch() -> None:
    with pytest.raises(UserError, match="every"):
        started(BAdam())


@pytest.mark.parametrize("steps", [1, 2, 3, 6, 7, 8, 100])
def test_a_run_too_short_for_all_blocks_is_told_how_many_it_trains(steps: int) -> None:
    policy = started(BAdam(every=2), 4)
    run(policy, steps)
    trained = sum(count > 0 for count in policy.counts)
    remark = policy.remark(steps)
    assert (remark is None) == (trained == 4)
    assert remark is None or f"{steps} steps train {trained} of 4 blocks" in remark


@pytest.mark.parametrize(
    ("settings", "named"),
    [({"every": 0}, "--select_every"), ({"order": "fixed"}, "--block_order"), ({"seed": -1}, "--selection_seed")],
)
def test_a_setting_out_of_range_is_refused_by_name(settings: dict, named: str) -> None:
    with pytest.raises(UserError, match=named):
        BAdam(**settings)
