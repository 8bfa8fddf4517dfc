"""States leave the GPU as the last work on them left them, however late that work is."""

import torch

from agsel import AdaGradSelect
from agsel.zero.residency import Partition
from agsel.zero.timetable import Moment
from tests.zero.test_moves import resident, selection_of


def test_states_are_evicted_after_their_last_use() -> None:
    masters = [torch.full((1000,), float(layer), device="cuda") for layer in range(20)]
    selection = selection_of(masters, AdaGradSelect(fraction=0.3, explore_steps=100, epsilon_start=1.0, seed=0))
    partitions = selection.residency.partitions
    selection.residency.keep_only({0, 1})
    selection.residency.synchronize()
    torch.cuda._sleep(500_000_000)  # 0.3 s
    for partition in partitions[:2]:
        rows_of(partition).fill_(7.0)
    selection.plan_step()
    selection.timetable.move(Moment.FORWARD)
    assert resident(selection) == set()
    selection.residency.synchronize()
    assert all(torch.all(rows_of(partition) == 7.0) for partition in partitions[:2])


def rows_of(partition: Partition) -> torch.Tensor:
    assert partition.rows is not None
    return partition.rows
