"""Where a process runs, and whether it still does."""

from __future__ import annotations

import os
import socket
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil


@dataclass(frozen=True)
class Address:
    """Of a process. `space` is equal for processes that know each other by their numbers.

    Attributes:
        started: when, in ticks of its host: numbers are given again.
    """

    host: str
    pid: int
    space: str
    started: int

    @staticmethod
    def own() -> Address:
        """Of this process."""
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        space = f"{boot} {os.readlink('/proc/self/ns/pid')}"
        return Address(socket.gethostname(), os.getpid(), space, _started(os.getpid()))

    def __str__(self) -> str:
        return f"host {self.host}, pid {self.pid}"

    def is_near(self) -> bool:
        """Whether this process can reach it by its number. Clones of a virtual machine may share a space."""
        own = Address.own()
        return (self.space, self.host) == (own.space, own.host)

    def is_alive(self) -> bool:
        """Whether it has not ended, if it is near."""
        with suppress(psutil.NoSuchProcess, OSError):
            return psutil.Process(self.pid).status() != psutil.STATUS_ZOMBIE and _started(self.pid) == self.started
        return False

    def is_stopped(self) -> bool:
        """Whether it is there but does not run, as after SIGSTOP."""
        with suppress(psutil.NoSuchProcess):
            return psutil.Process(self.pid).status() == psutil.STATUS_STOPPED
        return False


def _started(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])
