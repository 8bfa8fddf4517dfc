"""A run that a test watches and disturbs while it goes on: its output, its processes, and whether any is left."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import psutil

from tests.distributed import REPOSITORY, environment, free_port, remove_shared_memory

ANNOUNCING_TRAIN = REPOSITORY / "tests" / "announcing_train.py"
LINGER = 3
"""Seconds that the ranks stay in the phase in which they are hit."""
START, END = 240, 120
"""Seconds within which a run must have come to a phase, and must have ended once it was told to."""
TAG = "AGSEL_TEST_RUN"


class LiveRun:
    """A command and all its descendants, in whatever session, known by a variable in their environment.

    Attributes:
        folder: run folder.
        process: the command.
    """

    def __init__(self, folder: Path, process: subprocess.Popen[bytes], log: Path) -> None:
        self.folder, self.process, self._log = folder, process, log

    @property
    def output(self) -> str:
        return self._log.read_text()

    def reaches(self, phase: str) -> dict[int, int]:
        """Wait until both ranks of tests/announcing_train.py are in a phase. Returns their process numbers by rank."""
        self._wait(lambda: len(self._ranks_in(phase)) == 2, START, f"reach {phase}")
        return self._ranks_in(phase)

    def says(self, pattern: str) -> None:
        """Wait until it prints what a regular expression matches."""
        self._wait(lambda: re.search(pattern, self.output) is not None, START, f"say {pattern}")

    def ends(self, seconds: float = END) -> str:
        """Wait until no process of the run is left. Returns the output."""
        self._wait(lambda: not self._goes_on(), seconds, "end")
        return self.output

    def send(self, number: signal.Signals, target: str, ranks: dict[int, int]) -> None:
        """Send a signal to `rank N`, to `launch.py` above the ranks, to the `runner` above that, or to the `group`."""
        if target == "group":
            os.killpg(os.getpgid(ranks[0]), number)
            return
        launcher = psutil.Process(ranks[0]).parent()
        assert launcher is not None
        runner = launcher.parent()
        assert runner is not None
        assert "deepspeed.launcher.launch" in launcher.cmdline()
        assert any(word.endswith("/deepspeed") for word in runner.cmdline())
        pids = {"launch.py": launcher.pid, "runner": runner.pid} | {f"rank {rank}": ranks[rank] for rank in ranks}
        os.kill(pids[target], number)

    def processes(self) -> list[psutil.Process]:
        """Those of the run that have not ended."""
        found = []
        for process in psutil.process_iter():
            try:
                if process.environ().get(TAG) == str(self._log) and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
            except (psutil.NoSuchProcess, psutil.AccessDenied):
                continue
        return found

    def _goes_on(self) -> bool:
        """The command is asked first: for a moment, a process that has just been started has no environment to read."""
        return self.process.poll() is None or bool(self.processes())

    def _ranks_in(self, phase: str) -> dict[int, int]:
        return {int(rank): int(pid) for rank, pid in re.findall(rf"^PHASE (\d) (\d+) {phase}$", self.output, re.M)}

    def _wait(self, happened: Callable[[], bool], seconds: float, what: str) -> None:
        until = time.monotonic() + seconds
        while not happened():
            assert time.monotonic() < until, f"did not {what} in {seconds} s: {self.output[-6000:]}"
            assert self._goes_on() or happened(), f"ended and did not {what}: {self.output[-6000:]}"
            time.sleep(0.05)


@contextmanager
def live_run(
    folder: Path, command: Sequence[object], port: int, env: dict[str, str] | None = None
) -> Iterator[LiveRun]:
    """Start a command whose run folder is `folder`; what is left of it at the end is killed.

    Args:
        folder: is made, and receives the output too.
        command: with its arguments.
        port: of its ranks.
        env: changes to the environment.
    """
    folder.mkdir(exist_ok=True)
    log = folder / f"{port}.log"
    with log.open("w") as output:
        process = subprocess.Popen(
            list(map(str, command)),
            env=environment() | (env or {}) | {TAG: str(log)},
            cwd=REPOSITORY,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    run = LiveRun(folder, process, log)
    try:
        yield run
    finally:
        for left in run.processes():
            left.kill()
        process.wait()
        remove_shared_memory(port)


def announcing(linger_in: str, port: int) -> list[object]:
    """The command, to be followed by settings, of a run of two ranks that stays in a phase for a while."""
    return ["deepspeed", "--num_gpus", 2, "--master_port", port, ANNOUNCING_TRAIN, linger_in, LINGER]


@contextmanager
def announced_run(folder: Path, linger_in: str, arguments: Sequence[object]) -> Iterator[LiveRun]:
    """Start tests/announcing_train.py with settings."""
    port = free_port()
    with live_run(folder, [*announcing(linger_in, port), *arguments], port) as run:
        yield run
