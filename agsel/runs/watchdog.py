"""A rank that was stopped or frozen, or whose host is gone, ends the job with one line that names it.

Without it the other ranks wait in a collective for as long as its timeout, and the error then names nobody.
"""

from __future__ import annotations

import itertools
import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from typing import Any, NoReturn, cast

import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_default_store

from agsel.runs.address import Address
from agsel.runs.rank_log import end_process
from agsel.runs.ranks import is_first_to_fail, remove_shared_memory, say_error

TICKS = 20
"""Beats of a rank in one `rank_timeout`."""
SILENT_TICKS = 15
"""After which a rank is given up. Beats that are not in step take two of the others, telling all ranks another two."""
DONE = 1 << 40
"""Added to the count of a rank that has finished."""
PATIENCE_AT_END = 2.0
"""Seconds that a finishing rank waits for its own threads."""

_numbers = itertools.count()


@contextmanager
def watched_ranks(timeout: float) -> Iterator[None]:
    """While inside, another rank that is silent for `timeout` seconds ends this process, and with it the job.

    Each rank beats from a thread of its own, so it may be as slow as it likes: silent is only a rank whose whole
    process stands still. Every rank must enter. Leaving, by an exception too, says that this rank has finished.

    Args:
        timeout: in seconds. A single rank is not watched.
    """
    if dist.get_world_size() == 1:
        yield
        return
    watchdog = Watchdog(timeout)
    watchdog.start()
    try:
        yield
    finally:
        watchdog.stop()


class Watchdog:
    """Tells the store by which the ranks found each other that this rank lives, and asks it about the others.

    In two threads, as the store never answers when the process it lives in, rank 0's under `deepspeed`, stands still:
    one talks to the store, the other watches that it answers. Both count their own ticks instead of reading a clock.
    So a rank that was stopped itself and goes on, like all ranks of a suspended job, blames nobody.
    """

    def __init__(self, timeout: float) -> None:
        self._timeout = timeout
        self._tick = timeout / TICKS
        self._rank = dist.get_rank()
        # A connection of its own, as a collective may be waiting on the common one; torch's stubs do not know `clone`.
        self._store = cast(Any, _get_default_store()).clone()
        self._name = f"agsel/watchdog/{next(_numbers)}"
        others = [rank for rank in range(dist.get_world_size()) if rank != self._rank]
        self._beats = dict.fromkeys(others, 0)
        self._silent_ticks = dict.fromkeys(others, 0)
        self._addresses: dict[int, Address] = {}
        self._unanswered_ticks = 0
        self._leaving = threading.Event()
        self._talker = threading.Thread(target=self._talk, name="agsel-ranks", daemon=True)
        self._listener = threading.Thread(target=self._watch_store, name="agsel-store", daemon=True)

    def start(self) -> None:
        """Begin to beat and to watch."""
        self._talker.start()
        self._listener.start()

    def stop(self) -> None:
        """Tell the others that this rank has finished, and end both threads."""
        self._leaving.set()
        self._talker.join(PATIENCE_AT_END)
        self._listener.join(PATIENCE_AT_END)

    def _talk(self) -> None:
        # A store that breaks off is one that does not answer: the other thread sees to it.
        with suppress(RuntimeError):
            self._store.set(f"{self._name}/address/{self._rank}", json.dumps(asdict(Address.own())))
            while not self._leaving.is_set():
                self._store.add(f"{self._name}/{self._rank}", 1)
                for rank in self._beats:
                    self._listen_to(rank)
                self._unanswered_ticks = 0
                self._obey_verdict()
                self._leaving.wait(self._tick)
            self._store.add(f"{self._name}/{self._rank}", DONE)

    def _listen_to(self, rank: int) -> None:
        beats = self._store.add(f"{self._name}/{rank}", 0)
        if beats and rank not in self._addresses:
            self._addresses[rank] = Address(**json.loads(self._store.get(f"{self._name}/address/{rank}")))
        if beats >= DONE and rank == 0 and not torchrun_has_store():
            self._leaving.set()  # the store ends with it
        is_silent = beats == self._beats[rank] < DONE
        self._silent_ticks[rank] = self._silent_ticks[rank] + 1 if is_silent else 0
        self._beats[rank] = beats
        if self._silent_ticks[rank] > SILENT_TICKS:
            self._store.set(f"{self._name}/verdict", str(rank))
            if is_first_to_fail(self._store):
                self._accuse(self._describe(rank))
            self._end(rank)

    def _obey_verdict(self) -> None:
        """End with the others, although this rank would have found out for itself a moment later."""
        if self._store.check([f"{self._name}/verdict"]):
            self._end(int(self._store.get(f"{self._name}/verdict")))

    def _watch_store(self) -> None:
        while not self._leaving.wait(self._tick):
            self._unanswered_ticks += 1
            if self._unanswered_ticks > SILENT_TICKS:
                if self._speaks_for_host():
                    self._accuse("torchrun's store" if torchrun_has_store() else self._describe(0))
                self._end(0)

    def _speaks_for_host(self) -> bool:
        """Without a store nobody can be asked who was first: the lowest rank of a host that is not stopped speaks."""
        lower = [address for rank, address in self._addresses.items() if 0 < rank < self._rank]
        return all(address.is_stopped() for address in lower if address.is_near())

    def _describe(self, rank: int) -> str:
        address = self._addresses.get(rank)
        return f"rank {rank} ({address or 'host unknown'})"

    def _accuse(self, silent: str) -> None:
        say_error(
            f"{silent} has not answered for {self._timeout:g} s (--rank_timeout): its process is stopped or frozen, or "
            "its host is gone; all ranks end"
        )

    def _end(self, silent: int) -> NoReturn:
        """End this process, and of this host those that do not run: a stopped process would not heed SIGTERM."""
        time.sleep(2 * self._tick)  # the store may end with this process: let all ranks learn of it first
        for rank, address in self._addresses.items():
            if address.is_near() and (rank == silent or address.is_stopped()):
                remove_shared_memory(rank)
                with suppress(ProcessLookupError):
                    os.kill(address.pid, signal.SIGKILL)
        remove_shared_memory(self._rank)
        end_process(1)


def torchrun_has_store() -> bool:
    """Whether the store of the ranks is in the process of `torchrun`, not in that of rank 0."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
