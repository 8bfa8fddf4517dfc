"""Host memory for evicted optimizer partitions: one page-locked piece per rank, refused early if too large."""

from __future__ import annotations

import mmap
import socket
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
import torch

from agsel.errors import UserError
from agsel.zero.consensus import gather

ALIGNMENT = 512
"""Bytes; what CUDA's own allocators give."""


class Arena:
    """One piece of host memory, handed out as tensors with a storage of their own each.

    One piece, because PyTorch's pinned allocator rounds each allocation up to a power of two. Storages of their own,
    because a checkpoint stores whole storages.

    Args:
        shapes: of the tensors.
        dtype: of all tensors.
        pin: page-lock the memory, so that CUDA copies run beside the host and at full speed.

    Raises:
        UserError: the memory cannot be page-locked.
    """

    def __init__(self, shapes: Sequence[torch.Size], dtype: torch.dtype, pin: bool) -> None:
        self.nbytes = sum(_aligned(shape.numel() * dtype.itemsize) for shape in shapes)
        self._memory = mmap.mmap(-1, self.nbytes)
        self.tensors: list[torch.Tensor] = []
        offset = 0
        for shape in shapes:
            flat = torch.frombuffer(self._memory, dtype=dtype, count=shape.numel(), offset=offset)
            self.tensors.append(flat.view(shape))
            offset += _aligned(shape.numel() * dtype.itemsize)
        if pin:
            self._page_lock(self.tensors[0].data_ptr())

    def _page_lock(self, address: int) -> None:
        runtime: Any = torch.cuda.cudart()
        status = runtime.cudaHostRegister(address, self.nbytes, 0)
        if int(status) != 0:
            raise UserError(
                f"cannot page-lock {_gigabytes(self.nbytes)} of host memory ({runtime.cudaGetErrorString(status)}): "
                "raise the limit (ulimit -l), or set pin_memory to false (--pin_memory false)"
            )
        # The finalizer's reference to the memory keeps it mapped until it is unlocked.
        unlock = weakref.finalize(self, lambda _: runtime.cudaHostUnregister(address), self._memory)
        unlock.atexit = False


def require_host_memory(needed: int, group: Any) -> None:
    """Compare what the ranks of each host need together with what is free there. Every rank must call it.

    Args:
        needed: bytes this rank is going to allocate.
        group: process group of all ranks.

    Raises:
        UserError: on every rank, if it is too much on any host.
    """
    hosts = gather((socket.gethostname(), needed, available_bytes()), group)
    for name in sorted({host for host, _, _ in hosts}):
        total = sum(nbytes for host, nbytes, _ in hosts if host == name)
        available = min(free for host, _, free in hosts if host == name)
        if total > available:
            raise UserError(
                f"the optimizer states need {_gigabytes(total)} of host memory on {name}, {_gigabytes(available)} are "
                "free: use more hosts, or keep the states on the GPUs with offload_states=False "
                "(--offload_states false)"
            )


def available_bytes() -> int:
    """Host memory that can be had without swapping, within the limit of this process's control group."""
    return min([psutil.virtual_memory().available, *_control_group_bytes()])


def _control_group_bytes() -> list[int]:
    """What the control group (version 2) leaves, as a list of at most one number; page cache counts as free."""
    folder = Path("/sys/fs/cgroup")
    try:
        limit, used = ((folder / name).read_text().strip() for name in ("memory.max", "memory.current"))
        statistics = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    except OSError:
        return []
    return [] if limit == "max" else [int(limit) - int(used) + int(statistics["file"])]


def _aligned(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


def _gigabytes(nbytes: int) -> str:
    return f"{nbytes / 1e9:.1f} GB"
