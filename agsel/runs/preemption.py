"""Stopping a run early and cleanly: a signal, a STOP file, or a launcher that is gone; all ranks agree when.

SIGTERM, SIGUSR1, SIGINT and SIGHUP to any rank, output that nobody reads any more, and a file `STOP` in the run folder
ask for a stop. The ranks compare notes after every step and every evaluation batch, so that all of them save the same
step and end. Before the first step, `beginning.py` ends the run at once.
"""

from __future__ import annotations

import errno
import json
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.distributed as dist

from agsel.replacing import replace_file
from agsel.runs.outliving import is_output_gone
from agsel.runs.rank_log import ASKED, LOG
from agsel.zero.consensus import gather

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)
STOP_FILE = "STOP"
MARKER = "PREEMPTED"
"""File in the run folder that says: not finished, resume me. Job scripts look at it, not at the exit code."""
STOPPED_IN_SLURM = os.EX_TEMPFAIL
"""Exit code of a stopped run in a job of Slurm: after 0, jobs that wait for it (`afterok`) would start."""


class SignalWatch:
    """Remembers signals that ask for a stop instead of dying of them. Make it early: until then they kill.

    A signal that was ignored when the process started, as SIGHUP is under `nohup`, still is.

    Attributes:
        reason: what asked for a stop on this rank, None if nothing did.
    """

    def __init__(self) -> None:
        self.reason: str | None = None
        self._launchers = _deepspeed_launchers()
        self._process = os.getpid()
        self._heard = [number for number in SIGNALS if signal.getsignal(number) != signal.SIG_IGN]
        self._bell, self._ringer = socket.socketpair()
        self._ringer.setblocking(False)
        signal.set_wakeup_fd(self._ringer.fileno(), warn_on_full_buffer=False)
        threading.Thread(target=self._listen, name="agsel-signals", daemon=True).start()
        for number in self._heard:
            signal.signal(number, self._on_signal)

    def note(self, reason: str) -> None:
        """Ask for a stop. The first reason counts."""
        if self.reason is None:
            self.reason = reason
            LOG.write(f"{ASKED}, {reason}\n")

    def look(self) -> str | None:
        """The reason to stop, after a look at the launcher and the output: ranks whose launcher is killed go on."""
        if self.reason is None and any(map(_is_gone, self._launchers)):
            self.note("the launcher is gone")
        if self.reason is None and is_output_gone():
            self.note(f"the output is lost ({os.strerror(errno.EPIPE)})")
        return self.reason

    def _listen(self) -> None:
        """Hear of signals that come while the main thread waits in a library, where no handler of Python's can run."""
        while True:
            [number] = self._bell.recv(1)
            if number in self._heard:
                self.note(signal.Signals(number).name)

    def _on_signal(self, number: int, _: Any) -> None:
        """In a process that was forked off, as to tokenize the rows, SIGTERM ends that process."""
        if os.getpid() != self._process and number == signal.SIGTERM:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        self.note(signal.Signals(number).name)


os.register_at_fork(after_in_child=lambda: signal.set_wakeup_fd(-1))


def _deepspeed_launchers() -> list[psutil.Process]:
    """The two processes that the `deepspeed` command puts above a rank, or its one above `mpirun`."""
    ancestors = [*_ancestors(psutil.Process())]
    # Farther up, a wrapper may have the command among its arguments: only a script of that name counts.
    near = [process for process in ancestors[:2] if any(map(_names_launcher, _command(process)[:4]))]
    return near + [process for process in ancestors[2:] if any(map(_names_launcher, _command(process)[1:2]))]


def _ancestors(process: psutil.Process) -> Iterator[psutil.Process]:
    """The nearest first, up to one of which the system tells this user nothing."""
    with suppress(psutil.Error):
        while (parent := process.parent()) is not None:
            yield (process := parent)


def _command(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:  # it has ended, or is none of ours
        return []


def _names_launcher(word: str) -> bool:
    return word.startswith("deepspeed.launcher.") or Path(word).name in ("deepspeed", "ds")


def _is_gone(process: psutil.Process) -> bool:
    try:
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


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
        mark(self._folder, self.agreed, checkpoint=str(checkpoint), step=step)

    def _own_reason(self) -> str | None:
        if dist.get_rank(self._group) == 0 and (self._folder / STOP_FILE).exists():
            return f"a {STOP_FILE} file"
        return self._watch.look()


def mark(run_folder: Path, reason: str | None, **facts: Any) -> None:
    """Write the marker, so that job scripts know, and take the STOP file away, so that the run can be started again."""
    facts |= {"reason": reason, "time": datetime.now(UTC).isoformat(timespec="seconds")}
    replace_file(run_folder / MARKER, json.dumps(facts, indent=2) + "\n")
    (run_folder / STOP_FILE).unlink(missing_ok=True)


def exit_code_of_stop() -> int:
    """Of a run that was stopped. `torchrun --max-restarts` would start it again, were it not 0."""
    restarted = os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0") != "0"
    return STOPPED_IN_SLURM if "SLURM_JOB_ID" in os.environ and not restarted else 0


def start_worker(initialize: Callable[[int], None] | None, worker: int) -> None:
    """Start a worker of a data loader so that, like its rank, it survives a signal to all processes of the run.

    The steps to come until the stop need its rows. A SIGTERM from the rank itself still ends it.

    Args:
        initialize: the loader's own `worker_init_fn`.
        worker: number of the worker.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
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
