"""This rank's device: what time it is there, how much memory is in use, how fast its way to host memory is."""

from __future__ import annotations

import time
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator

LINK_BYTES, LINK_COPIES = 2**28, 8


def on_cuda() -> bool:
    """Whether DeepSpeed runs on CUDA; otherwise it runs on the CPU, where memory is not measured."""
    return get_accelerator().device_name() == "cuda"


def device() -> torch.device:
    """This rank's device."""
    return torch.device(get_accelerator().current_device_name())


def synchronize() -> None:
    """Wait until the device has done everything."""
    if on_cuda():
        torch.cuda.synchronize()


def moment() -> Any:
    """Now: an event on the compute stream, or on the CPU the clock's seconds."""
    if not on_cuda():
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def elapsed(first: Any, second: Any) -> float:
    """Milliseconds between two moments."""
    return first.elapsed_time(second) if on_cuda() else 1000 * (second - first)


def allocated() -> int:
    """Bytes in use on the device."""
    return torch.cuda.memory_allocated() if on_cuda() else 0


def peak() -> int:
    """Largest number of bytes in use on the device since `reset_peak`."""
    return torch.cuda.max_memory_allocated() if on_cuda() else 0


def reset_peak() -> None:
    """Forget earlier peaks."""
    if on_cuda():
        torch.cuda.reset_peak_memory_stats()


def pinned() -> int:
    """Bytes of page-locked host memory that PyTorch has handed out."""
    return torch.cuda.host_memory_stats()["active_bytes.current"] if on_cuda() else 0


def host_link_bandwidth() -> tuple[float, float] | tuple[None, None]:
    """Bytes per second to the device and to the host while every rank copies both ways, of the slowest rank.

    None without a GPU. Collective.
    """
    if not on_cuda():
        return None, None
    hosts = [torch.empty(LINK_BYTES, dtype=torch.uint8, pin_memory=True) for _ in range(2)]
    devices = [torch.empty(LINK_BYTES, dtype=torch.uint8, device=device()) for _ in range(2)]
    streams = [torch.cuda.Stream() for _ in range(2)]
    pairs = [(devices[0], hosts[0]), (hosts[1], devices[1])]
    for copies in (1, LINK_COPIES):  # the first is a warm-up
        dist.barrier()
        synchronize()
        events = [_copy(*pair, stream, copies) for pair, stream in zip(pairs, streams, strict=True)]
        synchronize()
    seconds = torch.tensor([elapsed(*pair) / 1000 for pair in events], device=device())
    dist.all_reduce(seconds, op=dist.ReduceOp.MAX)
    to_device, to_host = (LINK_BYTES * LINK_COPIES / seconds).tolist()
    return to_device, to_host


def _copy(target: torch.Tensor, source: torch.Tensor, stream: torch.cuda.Stream, copies: int) -> tuple[Any, Any]:
    """Copy on the stream so many times. Returns the moments before and after."""
    with torch.cuda.stream(stream):
        before = moment()
        for _ in range(copies):
            target.copy_(source, non_blocking=True)
        return before, moment()
