"""Where each block's optimizer partition lives: on the accelerator while the block is selected, else in host memory.

A partition is the fp32 master weights and the two Adam moments of one block on this rank. The three are rows of one
buffer, so a partition moves in one copy, or in consecutive parts. On CUDA the host memory is page-locked and the copies
run on side streams, beside the next forward and backward.
"""

from __future__ import annotations

import math
import os
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from agsel.zero.host_memory import Arena

MOMENTS = ("exp_avg", "exp_avg_sq")
SMALLEST_PART = 2**28
"""Bytes that leave the device at a time, at least: with smaller parts the host loses more than a read has to wait."""

POISON = "AGSEL_POISON"
"""Debug switch (environment, 1): overwrite every copy that must not be read any more, or not yet, with NaN."""


class Partition:
    """Master weights and Adam moments of one ZeRO partition: three rows of one buffer, on the device or on the host.

    Attributes:
        index: DeepSpeed's number of it: the param group at stages 1 and 2, the sub-group at stage 3.
        block: index of the block it belongs to.
        master: the flat fp32 parameter that the client optimizer steps.
        keeps_moments: whether they travel with the master; else they are dropped when it leaves the device.
        rows: [3, elements], where master and moments are now; [1, elements] where the moments are dropped.
        home: of `home_shape` in host memory, where they wait while the block is not selected; None without offloading.
    """

    def __init__(
        self,
        index: int,
        block: int,
        master: torch.Tensor,
        optimizer: torch.optim.Optimizer,
        *,
        keeps_moments: bool = True,
    ) -> None:
        self.index = index
        self.block = block
        self.master = master
        self.keeps_moments = keeps_moments
        self.rows: torch.Tensor | None = None
        self.home: torch.Tensor | None = None
        self._optimizer = optimizer
        self._device = master.device
        self._has_moments = True

    @property
    def shape(self) -> torch.Size:
        """Of its rows on the device."""
        return torch.Size((1 + len(MOMENTS), self.master.numel()))

    @property
    def home_shape(self) -> torch.Size:
        """Of those that wait in host memory."""
        return self.shape if self.keeps_moments else torch.Size((1, self.master.numel()))

    @property
    def is_resident(self) -> bool:
        """Whether it is on the device."""
        return self.rows is not None and self.rows is not self.home

    def adopt(self, rows: torch.Tensor) -> None:
        """Copy master and moments from wherever they are into `rows` and keep them there; missing moments are zero.

        At the start they are DeepSpeed's own tensors, and after a checkpoint load the moments are those it read.
        """
        state = self._optimizer.state[self.master]
        sources = self.master.detach(), *(state.get(name) for name in MOMENTS)
        for row, source in zip(rows, sources, strict=False):  # at home there may be a row for the master only
            if source is None:
                row.zero_()
            elif source.data_ptr() != row.data_ptr():
                row.copy_(source)
        state["step"] = self._placed_step(state.get("step", 0))
        self.point_to(rows)

    def start_anew(self) -> None:
        """Forget the moments and the step count; the master stays."""
        assert self.rows is not None, "only an adopted partition has moments"
        self.rows[1:].zero_()
        self._optimizer.state[self.master]["step"] = self._placed_step(0)
        self._has_moments = True

    @property
    def must_start_anew(self) -> bool:
        """Whether its moments were dropped when it left the device."""
        return not self._has_moments

    def make_room_for_moments(self) -> None:
        """Let a checkpoint be loaded over moments that start anew; `adopt` keeps them or drops them again."""
        if self.must_start_anew:
            state = self._optimizer.state[self.master]
            state.update({name: torch.zeros(self.master.numel(), dtype=self.master.dtype) for name in MOMENTS})
            state["step"] = self._placed_step(0)
            self._has_moments = True

    def point_to(self, rows: torch.Tensor) -> None:
        """Keep master and moments in `rows` from now on; their values are somebody else's business.

        Dropped moments are zeros that take no memory.
        """
        if len(rows) < self.shape[0]:
            self._has_moments = False
        self.rows = rows
        self.master.data = rows[0]
        state = self._optimizer.state[self.master]
        for row, name in enumerate(MOMENTS, start=1):
            state[name] = rows[row] if row < len(rows) else rows.new_zeros(()).expand(self.master.numel())

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


@dataclass(eq=False)
class Move:
    """A partition on its way: it belongs to `target` already, and so many of its elements have been sent there.

    Attributes:
        room: all that the partition leaves, of which `source` is what travels.
        stream: whose copies these are; evictions and fetches have one each.
        successor: the fetch into the room that an eviction leaves, None if the room is given back.
    """

    partition: Partition
    room: torch.Tensor
    source: torch.Tensor
    target: torch.Tensor
    stream: SideStream
    successor: Move | None = None
    sent: int = 0

    @property
    def remaining_bytes(self) -> int:
        """Not yet sent."""
        return self.source.nbytes - self.sent * self.source.itemsize


class Residency:
    """Moves partitions so that the wanted blocks are on the device and, when offloading, no others are.

    What is to be moved (`keep_only`) is sent in parts (`send`): a read from the device, as losses and attention masks
    do, waits for every copy to the host that was started before it. Where a partition takes the room of another, they
    change places part by part, so that both directions of the bus are busy at once. Evictions wait for all that the
    compute stream was given before they were sent, fetches for the room they go to or for what fills new memory, and
    both for the same partition's copy before. The compute stream waits for a fetch only where it steps that partition
    (`wait_for`).

    Args:
        partitions: all of this rank.
        device: where the selected blocks' are.
        offload_states: whether the others' are on the host.
        pin_memory: whether host memory is page-locked.
        pinned: indices of blocks whose partitions never leave the device.

    Attributes:
        partitions: all of this rank.
        pinned: indices of blocks whose partitions never leave the device.
        moved_bytes: sent so far between device and host or about to be, both ways.
    """

    def __init__(
        self,
        partitions: Sequence[Partition],
        device: torch.device,
        offload_states: bool,
        pin_memory: bool,
        pinned: frozenset[int] = frozenset(),
    ) -> None:
        self.partitions = list(partitions)
        self.pinned = pinned
        self.device = device
        self.moved_bytes = 0
        self._poison = os.environ.get(POISON) == "1"
        self._evictions, self._fetches = SideStream(device), SideStream(device)
        self._leaving: deque[Move] = deque()
        self._under_way: dict[Partition, Any] = {}
        self._movable = [p for p in partitions if p.block not in pinned] if offload_states else []
        if self._movable:
            pin = pin_memory and device.type == "cuda"
            self._arena = Arena([partition.home_shape for partition in self._movable], partitions[0].master.dtype, pin)
            for partition, home in zip(self._movable, self._arena.tensors, strict=True):
                partition.home = home

    def adopt(self, wanted: Iterable[int]) -> None:
        """Take over every partition, one at a time, and leave only those of the `wanted` blocks on the device.

        Called once at the start, and again after a checkpoint load.
        """
        wanted = set(wanted)
        self.synchronize()
        self._under_way.clear()
        for partition in self.partitions:
            rows = partition.home if partition.block not in wanted else None
            if rows is None:
                rows = partition.rows if partition.is_resident else self._new_rows(partition)
            assert rows is not None
            partition.adopt(rows)

    @torch.inference_mode(False)  # an evaluation may come first, and Adam refuses tensors made in its inference mode
    def keep_only(self, wanted: Iterable[int]) -> None:
        """Give the `wanted` blocks their place on the device, and when offloading all others theirs on the host.

        Fetches that find room begin at once; evictions, and fetches into the rows that they leave, with `send`.
        """
        wanted = set(wanted)
        leaving = [p for p in self._movable if p.is_resident and p.block not in wanted]
        arriving = [p for p in self._movable if not p.is_resident and p.block in wanted]
        if not leaving and not arriving:
            return
        if not {move.partition for move in self._leaving}.isdisjoint(arriving):
            self.send()  # a partition that has not all arrived on the host cannot come back from there
        exchanges, evictions = [], [self._move(partition, partition.home, self._evictions) for partition in leaving]
        for partition in arriving:
            leaver = next((eviction for eviction in evictions if eviction.room.shape == partition.shape), None)
            if leaver is not None:
                leaver.successor = self._move(partition, leaver.room, self._fetches)
                evictions.remove(leaver)
                exchanges.append(leaver)
            else:
                fetch = self._move(partition, self._new_rows(partition), self._fetches)
                self._fetches.wait_for(self._now())  # after whatever fills new memory, as deterministic algorithms do
                self._send_part(fetch, fetch.remaining_bytes)
        self._leaving += evictions + exchanges

    @property
    def leaving_bytes(self) -> int:
        """That wait to be sent to the host."""
        return sum(move.remaining_bytes for move in self._leaving)

    @property
    def exchanged_bytes(self) -> int:
        """Of the leaving ones those into whose room others come, so that sending them does not make memory free."""
        return sum(move.remaining_bytes for move in self._leaving if move.successor)

    def send(self, most: float = math.inf) -> None:
        """Start copying so many of the bytes that wait to leave the device, and what comes into their room.

        At least `SMALLEST_PART`, unless `most` is not positive; of one decision, room that is given back comes first.
        """
        if most <= 0 or not self._leaving:
            return
        self._evictions.wait_for(self._now())
        budget = max(most, SMALLEST_PART)
        while self._leaving and budget > 0:
            move = self._leaving[0]
            budget -= self._send_part(move, min(budget, move.remaining_bytes))
            if not move.remaining_bytes:
                self._leaving.popleft()

    def wait_for(self, partition: Partition) -> None:
        """Make the compute stream wait until a fetched partition, which has been sent, is there."""
        arrival = self._under_way.pop(partition, None)
        if arrival is not None:
            torch.cuda.current_stream(self.device).wait_event(arrival)

    def in_order_of_arrival(self, partitions: Iterable[Partition]) -> list[Partition]:
        """Resident partitions first, then those under way: work on the former hides the copies of the latter."""
        order = {partition: number for number, partition in enumerate(self._under_way)}
        return sorted(partitions, key=lambda partition: order.get(partition, -1))

    @property
    def keeps_moments(self) -> bool:
        """Whether blocks leave the device with their moments."""
        return all(partition.keeps_moments for partition in self._movable)

    def make_room_for_moments(self) -> None:
        """Let a checkpoint be loaded, also where moments are dropped."""
        for partition in self._movable:
            partition.make_room_for_moments()

    def resident_blocks(self) -> list[int]:
        """Indices of the blocks all of whose partitions are on the device, ascending."""
        absent = {partition.block for partition in self.partitions if not partition.is_resident}
        return sorted({partition.block for partition in self.partitions} - absent)

    def synchronize(self) -> None:
        """Wait, on the host, until everything is where it belongs."""
        self.send()
        self._evictions.synchronize()
        self._fetches.synchronize()

    def _move(self, partition: Partition, place: torch.Tensor | None, stream: SideStream) -> Move:
        """Decide on a move, without a copy."""
        room, travelling = partition.rows, partition.home_shape[0]
        assert room is not None, "only an adopted partition can be moved"
        assert place is not None, "only an offloading one has a home"
        partition.point_to(place)
        source, target = room[:travelling], place[:travelling]
        self.moved_bytes += target.nbytes
        return Move(partition, room, source, target, stream)

    def _send_part(self, move: Move, most: float) -> int:
        """Start copying the next part of a move, at most so many bytes and an element; returns how many.

        The same part of its successor follows.
        """
        part = slice(move.sent, min(move.source.numel(), move.sent + math.ceil(most / move.source.itemsize)))
        target, source = move.target.view(-1)[part], move.source.view(-1)[part]
        with move.stream.active():
            if move.sent == 0:
                move.stream.wait_for(self._under_way.pop(move.partition, None))
                move.stream.keep(move.source if move.stream is self._evictions else move.target)
            target.copy_(source, non_blocking=True)
            if self._poison:
                source.copy_(torch.full_like(source, math.nan, device=self.device), non_blocking=True)
            copied = move.stream.record()
        move.sent = part.stop
        if not move.remaining_bytes:
            self._under_way[move.partition] = copied
        if move.successor:
            self._fetches.wait_for(copied)
            self._send_part(move.successor, source.nbytes)
        return source.nbytes

    def _new_rows(self, partition: Partition) -> torch.Tensor:
        rows = torch.empty(partition.shape, dtype=partition.master.dtype, device=self.device)
        return rows.fill_(math.nan) if self._poison else rows

    def _now(self) -> Any:
        """An event at this point of the compute stream, None on the CPU."""
        return torch.cuda.current_stream(self.device).record_event() if self.device.type == "cuda" else None
