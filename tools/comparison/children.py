"""The processes of a comparison, which end when it does, however it ends."""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import time
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from threading import Lock

from agsel.errors import RunError

PATIENCE = 60.0
"""Seconds for training to save a checkpoint, before it is killed."""
REASON = re.compile(r"agsel: error: .*|^(\[rank\d+\]: )?\w[\w.]*(Error|Exception|Interrupt)\b.*")
"""Of lines: PyTorch prints the traceback of a rank with its name before every one."""
LINES_KEPT = 200


class Children:
    """Starts commands and waits for them, in several threads at once.

    What they print goes through a pipe of this process. So they notice when it is killed: agsel's training saves and
    ends when nobody reads its output any more.

    Args:
        inherited: file descriptors that stay open until the last child has ended.
    """

    def __init__(self, inherited: Iterable[int] = ()) -> None:
        self._inherited = tuple(inherited)
        self._processes: set[subprocess.Popen[bytes]] = set()
        self._guard = Lock()
        self.stopping = False

    def run(self, command: Sequence[str], log: Path, environment: Mapping[str, str]) -> None:
        """Run a command to its end, with its output behind that of earlier ones in a file.

        Raises:
            RunError: it failed, or must not start any more; the message is what it said last of why.
        """
        log.parent.mkdir(parents=True, exist_ok=True)
        last: deque[str] = deque(maxlen=LINES_KEPT)
        with log.open("ab", buffering=0) as file:
            file.write(f"$ {shlex.join(command)}\n".encode())
            process = self._start(command, environment)
            assert process.stdout is not None
            for line in process.stdout:
                file.write(line)
                last.append(line.decode(errors="replace").strip())
        code = process.wait()
        with self._guard:
            self._processes.discard(process)
        if code:
            raise RunError(f"{reason(last, code)} (see {log})")

    def _start(self, command: Sequence[str], environment: Mapping[str, str]) -> subprocess.Popen[bytes]:
        with self._guard:
            if self.stopping:
                raise RunError("stopped")
            process = subprocess.Popen(
                command,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                pass_fds=self._inherited,
                start_new_session=True,  # Ctrl-C is for the comparison, which ends them one by one
            )
            self._processes.add(process)
            return process

    def stop(self) -> None:
        """End all: training saves a checkpoint, if it is quick enough."""
        with self._guard:
            self.stopping = True
            processes = list(self._processes)
        for process in processes:
            _signal(process, signal.SIGTERM)
        until = time.monotonic() + PATIENCE
        for process in processes:
            with suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, until - time.monotonic()))
            _signal(process, signal.SIGKILL)


def _signal(process: subprocess.Popen[bytes], number: int) -> None:
    """To the process and all that it has started."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, number)


def reason(lines: Sequence[str], code: int) -> str:
    """Why a command failed: the last of its lines that says so, else how it ended."""
    said = next((line for line in reversed(lines) if REASON.search(line)), None)
    if said is not None:
        return said.removeprefix("agsel: error: ")
    return f"killed by signal {-code}" if code < 0 else f"exit code {code}"
