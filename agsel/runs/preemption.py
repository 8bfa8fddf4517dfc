"""Stopping a run early and cleanly: a signal, a STOP file, or a launcher that is gone; all ranks agree when.

SIGTERM and SIGUSR1 to any rank, and a file `STOP` in the run folder, ask for a stop. The ranks compare notes after
every step and every evaluation batch, so that all of them save the same step and end.
"""

from __future__ import annotations

import json
import os
import signal
import threading
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.distributed as dist

from agsel.zero.consensus import gather

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
STOP_FILE = "STOP"
MARKER = "PREEMPTED"
"""File in the run folder that says: not finished, resume me. Job scripts look at it, not at the exit code."""


class SignalWatch:
    """Remembers signals that ask for a stop instead of dying of them. Make it early: until then they kill.

    Attributes:
        reason: what asked for a stop on this rank, None if nothing did.
    """

    def __init__(self) -> None:
        self.reason: str | None = None
        self._launchers = _deepspeed_launchers()
        for number in SIGNALS:
            signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, _: Any) -> None:
        self.reason = self.reason or signal.Signals(number).name

    def look(self) -> str | None:
        """The reason to stop, after a look at the launcher: one that was killed leaves its ranks running."""
        if self.reason is None and any(map(_is_gone, self._launchers)):
            self.reason = "the launcher is gone"
        return self.reason


def _deepspeed_launchers() -> list[psutil.Process]:
    """The two processes that the `deepspeed` command puts above a rank, as far as they are there."""
    ancestors = psutil.Process().parents()[:2]
    return [process for process in ancestors if any(map(_names_launcher, process.cmdline()[:4]))]


def _names_launcher(word: str) -> bool:
    return word.startswith("deepspeed.launcher.") or Path(word).name in ("deepspeed", "ds")


def _is_gone(process: psutil.Process) -> bool:
    return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE


class StopRequests:
    """The common decision of all ranks to stop.

    Args:
        run_folder: where the STOP file is looked for and the marker is written.
        watch: of this rank's signals.
        group: process group of all ranks, on the host: asking must not wait for the GPU.

    Attributes:
        agreed: why the run stops, once all ranks know it.
    """

    def __init__(self, run_folder: Path, watch: SignalWatch, group: Any) -> None:
        self._folder, self._watch, self._group = run_folder, watch, group
        self.agreed: str | None = None
        if dist.get_rank(group) == 0:
            (run_folder / MARKER).unlink(missing_ok=True)

    def ask(self) -> bool:
        """Whether any rank was asked to stop. Every rank must call it at the same point of the run."""
        if self.agreed is None:
            own = self._own_reason()
            vote = torch.tensor([own is not None], dtype=torch.int32)
            dist.all_reduce(vote, dist.ReduceOp.MAX, group=self._group)
            if vote.item():
                reasons = gather(own, self._group)
                self.agreed = next(f"{reason} on rank {rank}" for rank, reason in enumerate(reasons) if reason)
        return self.agreed is not None

    def mark(self, checkpoint: Path | None, step: int) -> None:
        """Write the marker and take the STOP file away, so that the run can be resumed. On the first rank."""
        facts = {
            "reason": self.agreed,
            "step": step,
            "checkpoint": str(checkpoint),
            "time": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        (self._folder / MARKER).write_text(json.dumps(facts, indent=2) + "\n")
        (self._folder / STOP_FILE).unlink(missing_ok=True)

    def _own_reason(self) -> str | None:
        if dist.get_rank(self._group) == 0 and (self._folder / STOP_FILE).exists():
            return f"a {STOP_FILE} file"
        return self._watch.look()


def start_worker(initialize: Callable[[int], None] | None, worker: int) -> None:
    """Start a worker of a data loader so that, like its rank, it survives a SIGTERM to all processes of the run.

    The steps to come until the stop need its rows. A SIGTERM from the rank itself still ends it.

    Args:
        initialize: the loader's own `worker_init_fn`.
        worker: number of the worker.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    threading.Thread(target=_end_when_told, args=(os.getppid(),), daemon=True).start()
    if initialize is not None:
        initialize(worker)


def _end_when_told(rank: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != rank:
        pass
    os._exit(0)


def host_group() -> Any:
    """A process group of all ranks whose collectives run on the host. Every rank must call it."""
    return dist.new_group(backend="gloo")
