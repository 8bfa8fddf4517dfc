"""Before training begins there is nothing to save: a stop that is asked for ends the run at once, on all ranks.

A thread sees to it. The main thread may be in a library that lets no signal handler run: one that waits for the other
ranks, compiles, or loads a model.
"""

from __future__ import annotations

import itertools
import os
import sys
import threading
import time
from contextlib import suppress
from typing import Any, NoReturn, cast

import psutil
import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_default_store

from agsel.runs.claim import Claim
from agsel.runs.preemption import STOP_FILE, SignalWatch, exit_code_of_stop, mark
from agsel.runs.rank_log import end_process
from agsel.runs.ranks import remove_shared_memory
from agsel.zero.communication import abandon_operator

TICK = 0.2
"""Seconds between two looks."""
PATIENCE = 3.0
"""Seconds that a rank waits for the others to learn of the end: the store may be in its process."""
TRAINS, FAILED = "training", "failed"
"""What the ranks can agree on, besides a reason to stop."""

_numbers = itertools.count()


class Beginning:
    """The part of a run before its first step, from the moment it is entered until `is_over`.

    Args:
        signals: of this rank.

    Attributes:
        signals: of this rank.
    """

    def __init__(self, signals: SignalWatch) -> None:
        self.signals = signals
        self._store: Any = None
        self._claim: Claim | None = None
        self._name = f"agsel/beginning/{next(_numbers)}"
        self._failed = False
        self._leaving = threading.Event()
        self._thread = threading.Thread(target=self._look, name="agsel-beginning", daemon=True)

    def __enter__(self) -> Beginning:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._failed = error[0] is not None
        if self._failed and not self._leaving.is_set() and self.signals.look() is not None:
            self._thread.join(2 * PATIENCE)  # it ends this process: the signal has caused the error, in a child perhaps
        self._leave()

    def ranks_have_met(self) -> None:
        """From here on, all ranks end together."""
        # A connection of its own, as a collective may be waiting on the common one; torch's stubs do not know `clone`.
        self._store = cast(Any, _get_default_store()).clone()

    def has_folder(self, claim: Claim | None) -> None:
        """From here on, a STOP file in the run folder counts, and the marker of a stopped run is written there.

        Args:
            claim: of the first rank.
        """
        self._claim = claim

    def is_over(self, group: Any) -> None:
        """All ranks are ready to train: a stop is now for the end of a step. Every rank must call it.

        Whoever was asked to stop before the last rank came here has ended the run instead.

        Args:
            group: process group of all ranks, on the host.
        """
        self._decide(self._reason())  # the last look of the thread may be older than a request
        dist.barrier(group)
        if self._agree(TRAINS) == TRAINS:
            self._leave()
        else:
            self._thread.join()  # which ends this process

    def _leave(self) -> None:
        self._leaving.set()
        self._thread.join(PATIENCE)  # the store does not answer while the process that holds it stands still

    def _look(self) -> None:
        while not self._leaving.wait(TICK):
            reason = self._reason()
            if self._store is not None:
                self._obey(reason, self._decide(reason))
            elif reason is not None:
                self._end_alone(reason)
        if self._failed and self._store is not None:
            with suppress(RuntimeError):  # its process has ended
                self._agree(FAILED)

    def _reason(self) -> str | None:
        if self._claim is not None and (self._claim.folder / STOP_FILE).exists():
            self.signals.note(f"a {STOP_FILE} file")
        return self.signals.look()

    def _decide(self, reason: str | None) -> str | None:
        """What the ranks have agreed on, if they have: at the latest when one has a reason to stop."""
        try:
            return self._agree(f"{reason} on rank {dist.get_rank()}") if reason else self._agreed()
        except RuntimeError:  # the store is gone, and with it its rank
            return FAILED

    def _agree(self, proposal: str) -> str:
        """What all ranks do: the first proposal counts."""
        return self._store.compare_set(f"{self._name}/agreed", "", proposal).decode()

    def _agreed(self) -> str | None:
        name = f"{self._name}/agreed"
        return self._store.get(name).decode() if self._store.check([name]) else None

    def _obey(self, reason: str | None, agreed: str | None) -> None:
        """When a rank has failed, its launcher tells the others to stop: that is no stop that somebody asked for."""
        if agreed == FAILED:
            if reason is not None:
                _end_process(1)
        elif agreed not in (None, TRAINS):
            self._end_with_others(agreed)

    def _end_alone(self, reason: str) -> NoReturn:
        """The others cannot be told, but launchers end them when one rank fails."""
        if os.environ.get("RANK", "0") == "0":
            _say_goodbye(reason)
        _end_process(exit_code_of_stop() if os.environ.get("WORLD_SIZE", "1") == "1" else 1)

    def _end_with_others(self, reason: str) -> NoReturn:
        self._count("informed", dist.get_world_size())
        if dist.get_rank() == 0:
            _say_goodbye(reason)
        if self._claim is not None:
            with suppress(OSError):
                mark(self._claim.folder, reason, checkpoint=None, step=None)
                self._claim.release()
        # A launcher ends the first rank when another has ended with the code of a stop: it must have written by then.
        self._count("ready", dist.get_world_size())
        _end_process(exit_code_of_stop())

    def _count(self, name: str, ranks: int) -> None:
        """Be counted, and wait for the others."""
        name, until = f"{self._name}/{name}", time.monotonic() + PATIENCE
        with suppress(RuntimeError):  # the first rank has not waited any longer
            self._store.add(name, 1)
            while self._store.add(name, 0) < ranks and time.monotonic() < until:
                time.sleep(TICK / 4)


def _say_goodbye(reason: str) -> None:
    sys.stdout.write(f"stopped   {reason} before training began: nothing to save; start it with the same command\n")
    sys.stdout.flush()


def _end_process(code: int) -> NoReturn:
    """With what it has started, and without what it would leave behind."""
    abandon_operator()
    remove_shared_memory(os.environ.get("RANK", ""))
    with suppress(psutil.AccessDenied):  # where the system hides the processes of others, and says so
        for child in psutil.Process().children(recursive=True):
            with suppress(psutil.NoSuchProcess):
                child.kill()
    end_process(code)
