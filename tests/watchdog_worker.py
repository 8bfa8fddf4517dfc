"""Ranks that take turns in being slow, or that wait for ever, under the watchdog: on the ranks of test_watchdog.py."""

import sys
import time

import deepspeed
import torch
import torch.distributed as dist

from agsel.runs.ranks import limit_waiting
from agsel.runs.watchdog import watched_ranks
from agsel.zero.groups import data_parallel_group

SECONDS = 5.0


def compute(seconds: float) -> None:
    """Be busy in Python, as when tokenizing or compiling."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        sum(range(10_000))


def be_slow(rank: int) -> None:
    """Longer than the timeout: one rank computes while the other waits, then either has left the watch before it."""
    with watched_ranks(SECONDS):
        if rank == 1:
            compute(1.6 * SECONDS)
        dist.all_reduce(torch.zeros(1))
        if rank == 0:
            compute(1.6 * SECONDS)
    dist.barrier()
    wait_in_vain(rank)
    with watched_ranks(SECONDS):
        if rank == 0:
            time.sleep(SECONDS)  # until the other rank, which comes later, has entered too
            return  # and the store ends with this process
        compute(1.6 * SECONDS)


def wait_in_vain(rank: int) -> None:
    """In the process group of DeepSpeed's optimizers, for less long than torch would."""
    limit_waiting(2)
    if rank == 1:
        time.sleep(4)
        return
    try:
        dist.all_reduce(torch.zeros(1), group=data_parallel_group())
    except RuntimeError:
        print("gave up waiting", flush=True)


def wait(rank: int) -> None:
    """For a rank that never comes."""
    with watched_ranks(SECONDS):
        print(f"rank {rank} waits", flush=True)
        if rank != dist.get_world_size() - 1:
            dist.barrier()
        time.sleep(120)


if __name__ == "__main__":
    deepspeed.init_distributed("gloo", verbose=False)
    {"slow": be_slow, "wait": wait}[sys.argv[-1]](dist.get_rank())
    print("finished", flush=True)
