"""Ranks that stop answering end the job in time and by name; ranks that are only slow do not."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest

from tests.distributed import (
    REPOSITORY,
    environment,
    free_port,
    kill_session,
    remove_shared_memory,
    run_ranks,
)
from tests.tiny_run import TRAIN, save_model, save_rows, settings
from tests.watchdog_worker import SECONDS

WORKER = REPOSITORY / "tests" / "watchdog_worker.py"
LAUNCHER = 4.0
"""Seconds that the two processes of the `deepspeed` command take to notice that a rank has ended, and to end."""


class Job:
    """A run under the real `deepspeed` command that is going on."""

    def __init__(self, process: subprocess.Popen[bytes], log: Path) -> None:
        self.process = process
        self._log = log

    @property
    def output(self) -> str:
        return self._log.read_text(errors="replace")

    def wait_for(self, text: str, times: int = 1) -> None:
        end = time.monotonic() + 120
        while self.output.count(text) < times:
            assert self.process.poll() is None, self.output[-6000:]
            assert time.monotonic() < end, self.output[-6000:]
            time.sleep(0.1)

    def ranks(self) -> list[int]:
        """Process numbers by rank: of the descendants, those that are told their rank and whose parent is not."""
        found = {}
        for process in psutil.Process(self.process.pid).children(recursive=True):
            rank = process.environ().get("RANK")
            parent = process.parent()
            if rank is not None and parent is not None and "RANK" not in parent.environ():
                found[int(rank)] = process.pid
        return [found[rank] for rank in sorted(found)]

    def left_behind(self) -> list[int]:
        """Processes of the job's session that are still there."""
        left = []
        for pid in psutil.pids():
            with suppress(ProcessLookupError):
                if os.getsid(pid) == self.process.pid:
                    left.append(pid)
        return left

    def ends_within(self, seconds: float) -> str:
        """What it said, if it ends in time, with an error, and with all its processes."""
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(seconds)
        assert self.process.poll() not in (None, 0), self.output[-6000:]
        assert self.left_behind() == []
        return self.output


@contextmanager
def started(folder: Path, script: Path, *arguments: object, ranks: int = 2) -> Iterator[Job]:
    port, log = free_port(), folder / "log"
    deepspeed = shutil.which("deepspeed", path=environment()["PATH"])
    assert deepspeed is not None, "the deepspeed command is not installed"
    command = [deepspeed, "--num_gpus", ranks, "--master_port", port, script, *arguments]
    with log.open("wb") as file:
        process = subprocess.Popen(
            list(map(str, command)),
            env=environment(),
            cwd=REPOSITORY,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        yield Job(process, log)
    finally:
        kill_session(process.pid)
        process.wait()
        remove_shared_memory(port)


def send(number: signal.Signals, pids: list[int]) -> None:
    for pid in pids:
        os.kill(pid, number)


@pytest.mark.parametrize("rank", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_stopped_rank_ends_the_training_by_name(rank: int, tmp_path: Path) -> None:
    """Rank 0 is the harder case: the store by which ranks talk is in its process."""
    parts = save_model(tmp_path / "model"), save_rows(tmp_path / "rows.jsonl", 32)
    arguments = settings(*parts, tmp_path / "run", max_steps=100_000, logging_steps=1, rank_timeout=10)
    with started(tmp_path, TRAIN, *arguments) as job:
        job.wait_for("step      3/100000")
        pid = job.ranks()[rank]
        send(signal.SIGSTOP, [pid])
        output = job.ends_within(10 + LAUNCHER)
    blamed = f"agsel: error: rank {rank} (host {socket.gethostname()}, pid {pid}) has not answered for 10 s"
    assert output.count("agsel: error:") == output.count(blamed) == 1, output[-6000:]


@pytest.mark.slow
@pytest.mark.parametrize("stopped", [[1], [0, 1]], ids=str)
def test_one_of_many_ranks_speaks_after_the_job_was_suspended(stopped: list[int], tmp_path: Path) -> None:
    """Stopping all ranks for longer than the timeout and continuing them, as job systems do, ends nothing."""
    with started(tmp_path, WORKER, "wait", ranks=4) as job:
        job.wait_for("waits", times=4)
        pids = job.ranks()
        send(signal.SIGSTOP, pids)
        time.sleep(1.5 * SECONDS)
        send(signal.SIGCONT, pids)
        time.sleep(SECONDS / 2)
        assert "agsel: error:" not in job.output
        send(signal.SIGSTOP, [pids[rank] for rank in stopped])
        output = job.ends_within(SECONDS + LAUNCHER)
    assert output.count("agsel: error:") == output.count(f"agsel: error: rank {stopped[0]} (host ") == 1, output[-6000:]


@pytest.mark.slow
def test_a_slow_rank_and_one_that_has_finished_are_left_alone() -> None:
    output = run_ranks(WORKER, "slow")
    assert output.count("finished") == 2
    assert output.count("gave up waiting") == 1, "the other limit, for ranks that live but do not come"
    assert "agsel: error:" not in output
