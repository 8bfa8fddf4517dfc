"""Where each block's optimizer partition lives: on the accelerator while the block is selected, else in host memory.

A partition is the fp32 master weights and the two Adam moments of one block on this rank. The three are rows of one
buffer, so moving a partition is one copy. On CUDA the host buffer is pinned and the copies run on side streams, hidden
behind the next forward and backward.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch

MOMENTS = ("exp_avg", "exp_avg_sq")


class Partition:
    """Master weights and Adam moments of one ZeRO partition: three rows of one buffer, on the device or on the host.

    Attributes:
        index: DeepSpeed's number of it: the param group at stages 1 and 2, the sub-group at stage 3.
        block: index of the block it belongs to.
        master: the flat fp32 parameter that the client optimizer steps.
    """

    def __init__(self, index: int, block: int, master: torch.Tensor, optimizer: torch.optim.Optimizer) -> None:
        self.index = index
        self.block = block
        self.master = master
        self.on_device: torch.Tensor | None = None
        self.on_host: torch.Tensor | None = None
        self._optimizer = optimizer
        self._device = master.device

    def adopt(self) -> None:
        """Copy master and moments, wherever they are, into the rows of the current buffer; missing moments are zero.

        Called once at the start and again after a checkpoint load, which replaces the moments by tensors of its own.
        """
        if self.on_device is None and self.on_host is None:
            self.on_device = torch.zeros(3, self.master.numel(), dtype=self.master.dtype, device=self._device)
        rows = self._rows()
        state = self._optimizer.state[self.master]
        for row, source in zip(rows, (self.master.detach(), *(state.get(name) for name in MOMENTS)), strict=True):
            if source is not None and source.data_ptr() != row.data_ptr():
                row.copy_(source)
        state["step"] = self._placed_step(state.get("step", 0))
        self._point_to(rows)

    def to_host(self, pin: bool) -> torch.Tensor:
        """Copy the device rows to the host, point master and moments there and return the device rows."""
        rows = self.on_device
        assert rows is not None, "only a resident partition can be evicted"
        if self.on_host is None:
            self.on_host = torch.empty(rows.shape, dtype=rows.dtype, device="cpu", pin_memory=pin)
        self.on_host.copy_(rows, non_blocking=pin)
        self.on_device = None
        self._point_to(self.on_host)
        return rows

    def to_device(self, rows: torch.Tensor) -> None:
        """Fill `rows`, a device buffer, from the host and point master and moments there."""
        assert self.on_host is not None, "only an evicted partition can be fetched"
        rows.copy_(self.on_host, non_blocking=True)
        self.on_device = rows
        self._point_to(rows)

    def _rows(self) -> torch.Tensor:
        rows = self.on_device if self.on_device is not None else self.on_host
        assert rows is not None, "a partition is on the device or on the host"
        return rows

    def _point_to(self, rows: torch.Tensor) -> None:
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


class Residency:
    """Moves partitions so that the wanted blocks are on the device and, when offloading, no others are.

    On CUDA: the side stream of a copy first waits for the compute stream, the compute stream waits for a fetch only
    where it steps that partition (`wait_for`), and a fetch waits for evictions, so host memory is never read early.
    """

    def __init__(self, partitions: Sequence[Partition], device: torch.device, offload_states: bool) -> None:
        self.partitions = list(partitions)
        self.device = device
        self._offload = offload_states
        self._uses_streams = device.type == "cuda"
        self._evictions: Any = torch.cuda.Stream(device) if self._uses_streams else None
        self._fetches: Any = torch.cuda.Stream(device) if self._uses_streams else None
        self._arrivals: dict[Partition, Any] = {}

    def adopt(self, wanted: Iterable[int]) -> None:
        """Take over every partition, one at a time, and leave only those of the `wanted` blocks on the device."""
        wanted = set(wanted)
        self.synchronize()
        for partition in self.partitions:
            partition.adopt()
            self._move([partition], wanted)
        self.synchronize()

    def keep_only(self, wanted: Iterable[int]) -> None:
        """Start moving the partitions of the `wanted` blocks to the device, and all others off it if offloading."""
        self._move(self.partitions, set(wanted))

    def wait_for(self, partition: Partition) -> None:
        """Make the compute stream wait until a fetched partition has arrived."""
        arrival = self._arrivals.pop(partition, None)
        if arrival is not None:
            torch.cuda.current_stream(self.device).wait_event(arrival)

    def is_resident(self, block: int) -> bool:
        """Whether every partition of the block is on the device."""
        return all(partition.on_device is not None for partition in self.partitions if partition.block == block)

    def synchronize(self) -> None:
        """Wait, on the host, until every copy has landed."""
        if self._uses_streams:
            self._evictions.synchronize()
            self._fetches.synchronize()

    def _move(self, partitions: Sequence[Partition], wanted: set[int]) -> None:
        if self._offload:
            self._evict([p for p in partitions if p.on_device is not None and p.block not in wanted])
        self._fetch([p for p in partitions if p.on_device is None and p.block in wanted])

    def _evict(self, partitions: Sequence[Partition]) -> None:
        if not partitions:
            return
        if not self._uses_streams:
            for partition in partitions:
                partition.to_host(pin=False)
            return
        for partition in partitions:
            self._arrivals.pop(partition, None)
        self._evictions.wait_stream(torch.cuda.current_stream(self.device))
        self._evictions.wait_stream(self._fetches)
        with torch.cuda.stream(self._evictions):
            for partition in partitions:
                partition.to_host(pin=True).record_stream(self._evictions)

    def _fetch(self, partitions: Sequence[Partition]) -> None:
        if not partitions:
            return
        if not self._uses_streams:
            for partition in partitions:
                partition.to_device(self._new_rows(partition))
            return
        destinations = [self._new_rows(partition) for partition in partitions]
        self._fetches.wait_stream(torch.cuda.current_stream(self.device))
        self._fetches.wait_stream(self._evictions)
        with torch.cuda.stream(self._fetches):
            for partition, rows in zip(partitions, destinations, strict=True):
                partition.to_device(rows)
                self._arrivals[partition] = self._fetches.record_event()

    def _new_rows(self, partition: Partition) -> torch.Tensor:
        assert partition.on_host is not None
        return torch.empty_like(partition.on_host, device=self.device)
