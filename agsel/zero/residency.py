"""Where each block's optimizer partition lives: on the accelerator while the block is selected, else in host memory.

A partition is the fp32 master weights and the two Adam moments of one block on this rank. The three are rows of one
buffer, so moving a partition is one copy. On CUDA the host memory is page-locked and the copies run on side streams,
hidden behind the next forward and backward.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from agsel.zero.host_memory import Arena

MOMENTS = ("exp_avg", "exp_avg_sq")
POISON = "AGSEL_POISON"
"""Debug switch (environment, 1): overwrite every copy that must not be read any more, or not yet, with NaN."""


class Partition:
    """Master weights and Adam moments of one ZeRO partition: three rows of one buffer, on the device or on the host.

    Attributes:
        index: DeepSpeed's number of it: the param group at stages 1 and 2, the sub-group at stage 3.
        block: index of the block it belongs to.
        master: the flat fp32 parameter that the client optimizer steps.
        rows: [3, elements], where master and moments are now.
        home: the same shape in host memory, where they wait while the block is not selected; None without offloading.
    """

    def __init__(self, index: int, block: int, master: torch.Tensor, optimizer: torch.optim.Optimizer) -> None:
        self.index = index
        self.block = block
        self.master = master
        self.rows: torch.Tensor | None = None
        self.home: torch.Tensor | None = None
        self._optimizer = optimizer
        self._device = master.device

    @property
    def shape(self) -> torch.Size:
        """Of its rows."""
        return torch.Size((1 + len(MOMENTS), self.master.numel()))

    @property
    def is_resident(self) -> bool:
        """Whether it is on the device."""
        return self.rows is not None and self.rows is not self.home

    def adopt(self, rows: torch.Tensor) -> None:
        """Copy master and moments from wherever they are into `rows` and keep them there; missing moments are zero.

        At the start they are DeepSpeed's own tensors, and after a checkpoint load the moments are those it read.
        """
        state = self._optimizer.state[self.master]
        for row, source in zip(rows, (self.master.detach(), *(state.get(name) for name in MOMENTS)), strict=True):
            if source is None:
                row.zero_()
            elif source.data_ptr() != row.data_ptr():
                row.copy_(source)
        state["step"] = self._placed_step(state.get("step", 0))
        self._point_to(rows)

    def move_to(self, rows: torch.Tensor) -> torch.Tensor:
        """Start copying to `rows` on the current stream, keep master and moments there, and return the rows left."""
        left = self.rows
        assert left is not None, "only an adopted partition can be moved"
        rows.copy_(left, non_blocking=True)
        self._point_to(rows)
        return left

    def _point_to(self, rows: torch.Tensor) -> None:
        self.rows = rows
        self.master.data = rows[0]
        state = self._optimizer.state[self.master]
        for row, name in enumerate(MOMENTS, start=1):
            state[name] = rows[row]

    def _placed_step(self, step: torch.Tensor | float) -> torch.Tensor | int:
        """Adam's step count in the form the optimizer reads it, which is not where an evicted master lies."""
        if not isinstance(self._optimizer, torch.optim.Adam):
            return int(step)
        group = self._optimizer.param_groups[0]
        on_device = group.get("fused") or group.get("capturable")
        return torch.as_tensor(step, dtype=torch.float32).to(self._device if on_device else "cpu")


class SideStream:
    """A CUDA stream beside the compute stream. On the CPU, where copies are synchronous, it is nothing at all."""

    def __init__(self, device: torch.device) -> None:
        self._stream: Any = torch.cuda.Stream(device) if device.type == "cuda" else None

    def active(self) -> Any:
        """Run what is inside on this stream."""
        return torch.cuda.stream(self._stream)

    def wait_for(self, event: Any) -> None:
        """Do what comes next on this stream after an event; None has happened."""
        if event is not None:
            self._stream.wait_event(event)

    def keep(self, tensor: torch.Tensor) -> None:
        """Do not let the memory be used again before this stream has done what it was given."""
        if self._stream is not None:
            tensor.record_stream(self._stream)

    def record(self) -> Any:
        """An event at this point of the stream, None on the CPU."""
        return self._stream and self._stream.record_event()

    def synchronize(self) -> None:
        """Wait, on the host, for all of it."""
        if self._stream is not None:
            self._stream.synchronize()


class Residency:
    """Moves partitions so that the wanted blocks are on the device and, when offloading, no others are.

    An eviction waits for the last use of states (`mark_use`), a fetch for the room it goes to, both for the same
    partition's copy before; the compute stream waits for a fetch only where it steps that partition (`wait_for`).
    Evictions and fetches have a stream each, because both directions of the bus can be busy at once.

    Attributes:
        partitions: all of this rank.
        moved_bytes: copied so far between device and host, both ways.
    """

    def __init__(
        self, partitions: Sequence[Partition], device: torch.device, offload_states: bool, pin_memory: bool
    ) -> None:
        self.partitions = list(partitions)
        self.device = device
        self.moved_bytes = 0
        self._offload = offload_states
        self._poison = os.environ.get(POISON) == "1"
        self._evictions, self._fetches = SideStream(device), SideStream(device)
        self._under_way: dict[Partition, Any] = {}
        self._used: Any = None
        if offload_states:
            pin = pin_memory and device.type == "cuda"
            self._arena = Arena([partition.shape for partition in partitions], partitions[0].master.dtype, pin)
            for partition, home in zip(partitions, self._arena.tensors, strict=True):
                partition.home = home

    def adopt(self, wanted: Iterable[int]) -> None:
        """Take over every partition, one at a time, and leave only those of the `wanted` blocks on the device.

        Called once at the start, and again after a checkpoint load.
        """
        wanted = set(wanted)
        self.synchronize()
        self._under_way.clear()
        for partition in self.partitions:
            at_home = self._offload and partition.block not in wanted
            rows = partition.home if at_home else partition.rows if partition.is_resident else self._new_rows(partition)
            assert rows is not None
            partition.adopt(rows)
        self.mark_use()

    @torch.inference_mode(False)  # an evaluation may come first, and Adam refuses tensors made in its inference mode
    def keep_only(self, wanted: Iterable[int]) -> None:
        """Start moving the partitions of the `wanted` blocks to the device, and all others off it if offloading."""
        if not self._offload:
            return
        wanted = set(wanted)
        vacated = self._evict([p for p in self.partitions if p.is_resident and p.block not in wanted])
        self._fetch([p for p in self.partitions if not p.is_resident and p.block in wanted], vacated)

    def wait_for(self, partition: Partition) -> None:
        """Make the compute stream wait until a fetched partition has arrived."""
        arrival = self._under_way.pop(partition, None)
        if arrival is not None:
            torch.cuda.current_stream(self.device).wait_event(arrival)

    def mark_use(self) -> None:
        """Until this point of its work the compute stream may use any states; later only those it waits for."""
        self._used = self._now()

    def in_order_of_arrival(self, partitions: Iterable[Partition]) -> list[Partition]:
        """Resident partitions first, then those under way: work on the former hides the copies of the latter."""
        order = {partition: number for number, partition in enumerate(self._under_way)}
        return sorted(partitions, key=lambda partition: order.get(partition, -1))

    def is_resident(self, block: int) -> bool:
        """Whether every partition of the block is on the device."""
        return all(partition.is_resident for partition in self.partitions if partition.block == block)

    def synchronize(self) -> None:
        """Wait, on the host, until every copy has landed."""
        self._evictions.synchronize()
        self._fetches.synchronize()

    def _evict(self, partitions: Sequence[Partition]) -> list[tuple[torch.Tensor, Any]]:
        """Returns the rows that they leave, each with the event after which it may be written."""
        vacated = []
        with self._evictions.active():
            self._evictions.wait_for(self._used)
            for partition in partitions:
                assert partition.home is not None
                rows = self._move(partition, partition.home, self._evictions)
                self._evictions.keep(rows)
                vacated.append((rows, self._under_way[partition]))
        return vacated

    def _fetch(self, partitions: Sequence[Partition], vacated: list[tuple[torch.Tensor, Any]]) -> None:
        """Into rows that others leave, where the shape is right: so an exchange needs no memory."""
        rooms = [_take_room(vacated, partition.shape) for partition in partitions]
        vacated.clear()  # what nobody takes is free for those who found nothing
        for partition, room in zip(partitions, rooms, strict=True):
            rows, vacancy = room or (self._new_rows(partition), self._now())
            with self._fetches.active():
                self._fetches.wait_for(vacancy)
                self._fetches.keep(rows)
                self._move(partition, rows, self._fetches)

    def _move(self, partition: Partition, rows: torch.Tensor, stream: SideStream) -> torch.Tensor:
        stream.wait_for(self._under_way.pop(partition, None))
        left = partition.move_to(rows)
        self.moved_bytes += rows.nbytes
        if self._poison:
            left.copy_(torch.full_like(left, math.nan, device=self.device), non_blocking=True)
        self._under_way[partition] = stream.record()
        return left

    def _new_rows(self, partition: Partition) -> torch.Tensor:
        rows = torch.empty(partition.shape, dtype=partition.master.dtype, device=self.device)
        return rows.fill_(math.nan) if self._poison else rows

    def _now(self) -> Any:
        """An event at this point of the compute stream, None on the CPU."""
        return torch.cuda.current_stream(self.device).record_event() if self.device.type == "cuda" else None


def _take_room(vacated: list[tuple[torch.Tensor, Any]], shape: torch.Size) -> tuple[torch.Tensor, Any] | None:
    for index, (rows, _) in enumerate(vacated):
        if rows.shape == shape:
            return vacated.pop(index)
    return None
