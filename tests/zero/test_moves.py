"""What moves when: memory never above what a step may hold, nothing moved twice, every state where it belongs."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from agsel import AdaGradSelect, RandomBlocks
from agsel.blocks import find_blocks, hidden_states
from agsel.policies import Policy
from agsel.zero import residency
from agsel.zero.parameters import block_infos
from agsel.zero.residency import POISON, Partition, Residency
from agsel.zero.selection import Selection
from agsel.zero.timetable import LEAVING_IN_BACKWARD, SHARE_IN_FORWARD, Moment
from tests.tiny import tiny_model
from tests.zero.rules import EveryClause

LAYERS = 20
ELEMENTS = 1000

pytestmark = pytest.mark.usefixtures("one_rank")


@pytest.fixture
def masters() -> list[torch.Tensor]:
    return [torch.full((ELEMENTS,), float(layer)) for layer in range(LAYERS)]


def selection_of(masters: list[torch.Tensor], policy: Policy) -> Selection:
    """A selection over layers with states of their own: no ranks, nothing to train."""
    blocks = [block for block in find_blocks(tiny_model(layers=LAYERS)) if block.is_layer]
    optimizer = torch.optim.AdamW([{"params": [master]} for master in masters])
    partitions = [Partition(layer, layer, master, optimizer) for layer, master in enumerate(masters)]
    policy.start(block_infos(blocks))
    device = masters[0].device
    residency = Residency(partitions, device, offload_states=True, pin_memory=True, pinned=policy.pinned)
    selection = Selection(blocks, policy, residency, None, max_skipped_steps=1)
    selection.adopt_states()
    selection.plan_step()
    return selection


def resident(selection: Selection) -> set[int]:
    return set(selection.residency.resident_blocks())


def one_step(selection: Selection) -> dict[Any, set[int]]:
    """The resident blocks at the start of a step and after each moment."""
    selection.plan_step()
    history: dict[Any, set[int]] = {None: resident(selection)}
    for moment in Moment:
        selection.timetable.move(moment)
        selection.timetable.move(moment)  # of another micro-batch
        history[moment] = resident(selection)
    update = selection.commit(torch.arange(1.0, LAYERS + 1, dtype=torch.float64), loss_scale=1.0)
    assert update is not None
    assert resident(selection) == update.blocks | selection.policy.pinned
    assert selection.residency.leaving_bytes == 0
    assert_own_states(selection)
    return history


def assert_own_states(selection: Selection) -> None:
    for layer, partition in enumerate(selection.residency.partitions):
        assert (partition.rows[0] == layer).all()


def evenly(start: float, end: float, parts: int) -> Any:
    """Bytes that are left after each of equal parts, rounded to elements."""
    return pytest.approx([start + (end - start) * part / parts for part in range(1, parts + 1)], abs=8)


@pytest.fixture
def in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """States this small would be sent as a whole; what is read before it has arrived is NaN."""
    monkeypatch.setattr(residency, "SMALLEST_PART", 1)
    monkeypatch.setenv(POISON, "1")


@pytest.mark.parametrize("fraction", [0.05, 0.1, 0.3, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("every", [1, 3])
def test_a_planned_exchange_needs_no_more_memory_and_moves_nothing_twice(
    masters: list[torch.Tensor], fraction: float, every: int
) -> None:
    policy = RandomBlocks(fraction=fraction, every=every, seed=2)
    selection = selection_of(masters, policy)
    count = max(1, int(fraction * LAYERS))
    share = math.ceil(SHARE_IN_FORWARD * count)
    one_step(selection)
    for _ in range(30):
        moved = selection.residency.moved_bytes
        planned = set(policy.plan().trainable)
        history = one_step(selection)
        before = history[None]
        leaving, arriving = before - planned, planned - before
        parked = max(0, len(before & planned) - share)  # needed again in this step, and without room until then
        assert len(history[Moment.FORWARD]) == len(history[Moment.BACKWARD]) == share
        assert history[Moment.BACKWARD] <= planned
        assert history[Moment.LATE_BACKWARD] == planned
        moves = len(leaving) + len(arriving) + 2 * parked
        assert selection.residency.moved_bytes - moved == moves * 3 * 4 * ELEMENTS


def test_an_exploring_step_leaves_the_forward_nothing_and_guesses_in_the_backward(masters: list[torch.Tensor]) -> None:
    policy = AdaGradSelect(fraction=0.3, explore_steps=100, epsilon_start=1.0, epsilon_end=1.0, seed=0)
    selection = selection_of(masters, policy)
    assert one_step(selection)[Moment.LATE_BACKWARD] == set()
    best = set(range(14, LAYERS))
    for _ in range(3):
        history = one_step(selection)
        assert history[Moment.FORWARD] == history[Moment.BACKWARD] == set()
        assert history[Moment.LATE_BACKWARD] == best


def test_states_moved_in_an_evaluation_can_be_stepped(masters: list[torch.Tensor]) -> None:
    selection = selection_of(masters, RandomBlocks(fraction=0.3, seed=2))
    with torch.inference_mode():
        for moment in Moment:
            selection.timetable.move(moment)
    arrived = [masters[layer] for layer in selection.policy.plan().trainable]
    optimizer = torch.optim.AdamW(arrived)
    for master in arrived:
        assert not master.is_inference()
        master.grad = torch.ones_like(master)
    optimizer.step()


def test_an_exchange_uses_the_memory_that_is_left(masters: list[torch.Tensor]) -> None:
    selection = selection_of(masters, RandomBlocks(fraction=0.3, seed=2))
    one_step(selection)
    rows = [partition.rows for partition in selection.residency.partitions if partition.is_resident]
    selection.plan_step()
    for moment in (Moment.FORWARD, Moment.BACKWARD):
        selection.timetable.move(moment)
        now = [partition.rows for partition in selection.residency.partitions if partition.is_resident]
        assert {id(own) for own in now} < {id(own) for own in rows}


@pytest.mark.usefixtures("in_parts")
@pytest.mark.parametrize("lowest", [0, 8, LAYERS])
@pytest.mark.parametrize("fraction", [0.5, 0.9])
def test_states_travel_with_the_layers_of_forward_and_backward(
    masters: list[torch.Tensor], lowest: int, fraction: float
) -> None:
    """Of which the backward reaches those above `lowest`."""
    selection = selection_of(masters, RandomBlocks(fraction=fraction, seed=2))
    moving = selection.residency
    one_step(selection)
    before = resident(selection)
    selection.plan_step()
    hidden = torch.ones(1)
    forward, backward = [], []
    for layer in range(LAYERS):
        hidden = (hidden * 1).requires_grad_(layer >= lowest)
        selection.timetable.enter_layer(hidden, LAYERS - layer)
        forward.append(moving.leaving_bytes)
        if hidden.requires_grad:
            hidden.register_hook(lambda _: backward.append(moving.leaving_bytes))
    after = resident(selection)
    leaving, arriving = len(before - after) * 12 * ELEMENTS, len(after - before) * 12 * ELEMENTS
    assert leaving > arriving
    for_backward = min(LEAVING_IN_BACKWARD * leaving, arriving)
    assert moving.leaving_bytes == moving.exchanged_bytes, "room that is given back is free when the forward ends"
    selection.timetable.move(Moment.BACKWARD)
    at_once = moving.leaving_bytes
    selection.timetable.enter_layer(hidden, 1)  # computed again, for its gradients
    assert at_once == moving.leaving_bytes == (forward[-1] if lowest < LAYERS else 0)
    if hidden.requires_grad:
        hidden.sum().backward()
    assert moving.leaving_bytes == 0
    assert forward == evenly(leaving, for_backward, LAYERS)
    assert backward == evenly(for_backward, 0, LAYERS - lowest)
    assert_own_states(selection)


def test_hidden_states_are_found_by_position_and_by_name() -> None:
    hidden, mask = torch.ones(1), torch.ones(1, dtype=torch.bool)
    assert hidden_states(hidden, mask) is hidden
    assert hidden_states(None, mask, hidden) is hidden
    assert hidden_states(None, mask) is None


@pytest.mark.usefixtures("in_parts")
def test_states_change_places_part_by_part(masters: list[torch.Tensor]) -> None:
    moving = selection_of(masters, RandomBlocks(fraction=0.3, seed=2)).residency
    moving.keep_only(range(3))
    moving.synchronize()
    leaving, arriving = moving.partitions[0], moving.partitions[3]
    leaving.rows.fill_(1.0)
    arriving.rows.fill_(2.0)
    room, old_home, new_home = (rows.view(-1) for rows in (leaving.rows, arriving.rows, leaving.home))
    moving.keep_only(range(3, 6))
    assert arriving.rows.data_ptr() == room.data_ptr()
    for sent in (750, 1500, 2250, 3000):
        moving.send(4 * 750)
        assert (new_home[:sent] == 1.0).all()
        assert (room[:sent] == 2.0).all()
        assert (room[sent:] == 1.0).all()
        assert old_home[:sent].isnan().all(), "what must not be read any more"


@pytest.mark.usefixtures("in_parts")
@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
def test_states_that_have_not_left_yet_can_be_called_back(masters: list[torch.Tensor], share: float) -> None:
    selection = selection_of(masters, RandomBlocks(fraction=0.3, seed=2))
    moving = selection.residency
    ranges = [range(*ends) for ends in ((0, 10), (5, 15), (0, 10), (0, 0), (0, LAYERS), (0, 3), (2, 5), (3, 6))]
    for wanted in (*ranges, (3, 4, 6), (3, 4, 5)):
        moving.keep_only(wanted)
        assert resident(selection) == set(wanted)
        moving.send(share * moving.leaving_bytes)
    assert (moving.leaving_bytes == 0) == (share == 1)
    moving.synchronize()
    assert moving.leaving_bytes == 0
    assert_own_states(selection)


def test_pinned_states_never_leave_and_have_no_place_on_the_host(masters: list[torch.Tensor]) -> None:
    """Whatever a step does: nothing, all, what is planned, or what is chosen among a few."""
    selection = selection_of(masters, EveryClause(fraction=0.3, seed=3))
    pinned, *movable = selection.residency.partitions
    address = pinned.rows.data_ptr()
    for _ in range(12):
        history = one_step(selection)
        assert all(0 in blocks for blocks in history.values())
        assert pinned.rows.data_ptr() == address
    assert pinned.home is None
    assert all(partition.home is not None for partition in movable)
    assert selection.counts["layers.0"] == 9, "all but the steps that measure"


def test_states_that_start_anew_keep_their_master_alone(masters: list[torch.Tensor]) -> None:
    selection = selection_of(masters, RandomBlocks(fraction=0.3, seed=2))
    partition = selection.residency.partitions[4]
    selection.residency.keep_only({4})
    for value, row in enumerate(partition.rows):
        row.fill_(value + 1)
    state = partition._optimizer.state[partition.master]
    state["step"] = partition._placed_step(7)
    partition.start_anew()
    assert (partition.master == 1).all()
    assert not state["exp_avg"].any()
    assert not state["exp_avg_sq"].any()
    assert int(state["step"]) == 0
