"""A run of tests/announcing_train.py on hosts: the commands that start its ranks, and what they print."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Sequence
from pathlib import Path

import psutil

from agsel.runs.checkpoints import missing_part
from agsel.runs.preemption import MARKER
from tests.cluster.hosts import Hosts
from tests.live_run import ANNOUNCING_TRAIN, LINGER, LiveRun
from tests.tiny_run import save_model, save_rows, settings

RANK_TIMEOUT = 30


class HostsRun(LiveRun):
    """Commands on hosts that are one run of two ranks; all print into one file.

    Args:
        made: the hosts.
        folder: of the run.
    """

    def __init__(self, made: Hosts, folder: Path) -> None:
        self._made, self.folder, self._commands = made, folder, list[subprocess.Popen[bytes]]()
        self._log = made.folder / f"{os.urandom(4).hex()}.log"
        self._log.touch()

    def start(self, host: str, command: Sequence[object], env: dict[str, str] | None = None) -> subprocess.Popen[bytes]:
        """Start one of the commands."""
        with self._log.open("a") as output:
            process = self._made.start(host, command, env, stdout=output, stderr=subprocess.STDOUT)
        self._commands.append(process)
        return process

    def exit_codes(self, seconds: float) -> list[int]:
        """Of the commands, when none of them and no rank is left."""
        self.ends(seconds)
        return [command.wait() for command in self._commands]

    def kill(self, rank: int, phase: str) -> None:
        """Kill a rank in a phase that both have reached."""
        os.kill(self.reaches(phase)[rank], signal.SIGKILL)

    def _goes_on(self) -> bool:
        started = {pid for phase in ("loading", "step") for pid in self._pids(phase)}
        return any(command.poll() is None for command in self._commands) or any(map(_is_alive, started))

    def _pids(self, phase: str) -> list[int]:
        lines = (line.split() for line in self.output.splitlines() if line.startswith("PHASE "))
        return [int(pid) for _, _, pid, word, *_ in lines if word == phase]


def _is_alive(pid: int) -> bool:
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


class Training:
    """The settings of runs in one folder, each of which goes on from where the last one was stopped.

    Args:
        folder: seen by all hosts.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "run"
        self.folder.mkdir()
        self._parts = save_model(folder / "model"), save_rows(folder / "rows.jsonl", 64)

    def checkpoint(self) -> Path:
        """The one that the marker of the stopped run names; it is complete."""
        checkpoint = Path(json.loads((self.folder / MARKER).read_text())["checkpoint"])
        assert missing_part(checkpoint) is None
        return checkpoint

    def script(self, linger_in: str) -> list[object]:
        """The script with its arguments, which stays in a phase for a while."""
        return [ANNOUNCING_TRAIN, linger_in, LINGER, *self._settings()]

    def _settings(self) -> list[str]:
        return settings(
            *self._parts,
            self.folder,
            max_steps=16,
            resume_from_checkpoint="auto",
            rank_timeout=RANK_TIMEOUT,
        )
