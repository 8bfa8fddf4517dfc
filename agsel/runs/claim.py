"""One run at a time in a run folder, which every host must see: a file `LOCK` there names the run that goes on.

Its time goes on while that run lives: another host cannot ask whether a process does. Files are made and renamed, never
locked, because network file systems can do that.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch.distributed as dist

from agsel.errors import UserError
from agsel.runs.address import Address
from agsel.runs.folder import make_run_folder
from agsel.runs.rank_log import end_process
from agsel.runs.ranks import say_error
from agsel.zero.consensus import first_rank_does, gather

LOCK = "LOCK"
BEAT = 2.0
"""Seconds between two signs of life of the run that holds the folder."""
SILENCE = 20.0
"""Seconds without one, after which a run of another host has been killed."""
PATIENCE = 5.0
"""Seconds that a network file system may take to show a new file on another host."""


@dataclass(frozen=True)
class Owner:
    """A run: the process of its first rank, and a word of its own."""

    address: Address
    word: str

    @staticmethod
    def read(lock: Path) -> Owner | None:
        """The run that holds a folder; None if none does, or if it is just about to write its name."""
        with suppress(OSError, ValueError, TypeError, KeyError):
            fields = json.loads(lock.read_text())
            return Owner(Address(**fields["address"]), fields["word"])
        return None

    def create(self, lock: Path) -> bool:
        """Hold the folder, unless another run does."""
        try:
            descriptor = os.open(lock, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
        except FileExistsError:
            return False
        with open(descriptor, "w") as file:
            file.write(json.dumps(asdict(self)) + "\n")
        return True


class Claim:
    """What the first rank of a run holds a folder with.

    Args:
        run_folder: of the run.
        owner: this run, whose name the folder has.
    """

    def __init__(self, run_folder: Path, owner: Owner) -> None:
        self.folder = run_folder
        self._lock, self._owner = run_folder / LOCK, owner
        self._leaving = threading.Event()
        self._thread = threading.Thread(target=self._live, name="agsel-claim", daemon=True)
        self._thread.start()

    def release(self) -> None:
        """Leave the folder to others."""
        self._leaving.set()
        self._thread.join()
        if Owner.read(self._lock) == self._owner:
            self._lock.unlink(missing_ok=True)

    def _live(self) -> None:
        while not self._leaving.wait(BEAT):
            with suppress(OSError):  # a network file system that does not answer now
                self._show_life()

    def _show_life(self) -> None:
        """Touch the file; make it anew if someone has deleted it."""
        holder = Owner.read(self._lock)
        if holder == self._owner or (holder is None and self._owner.create(self._lock)):
            os.utime(self._lock)
        elif holder is not None:
            say_error(
                f"the run of {holder.address} has taken over {self.folder} (--output_dir), as this one gave no sign "
                f"of life for {SILENCE:g} s: this one ends"
            )
            end_process(1)


@contextmanager
def claimed(run_folder: Path, group: Any) -> Iterator[Claim | None]:
    """While inside, no other run uses the folder. Every rank must enter; the first one gets the claim.

    Args:
        run_folder: is made if it is not there.
        group: process group of all ranks, on the host.

    Raises:
        UserError: another run uses the folder, it cannot be written, or not every host sees it.
    """
    first_rank_does(partial(make_run_folder, run_folder), group)
    owner = first_rank_does(partial(take, run_folder), group)
    claim = Claim(run_folder, owner) if dist.get_rank(group) == 0 else None
    try:
        _require_seen(run_folder, owner, group)
        yield claim
    finally:
        if claim is not None:
            claim.release()


def take(run_folder: Path) -> Owner:
    """Put the name of this run on the folder, instead of one that was killed.

    Raises:
        UserError: another run uses the folder, or it cannot be written.
    """
    lock, owner = run_folder / LOCK, Owner(Address.own(), uuid.uuid4().hex)
    try:
        while not owner.create(lock):
            holder = Owner.read(lock)
            _require_killed(lock, holder)
            _take_away(lock, holder)
    except OSError as error:
        raise UserError(
            f"cannot write to the run folder {run_folder} (--output_dir), {error}: choose another"
        ) from error
    return owner


def _require_killed(lock: Path, holder: Owner | None) -> None:
    """Refuse a folder whose run lives. One of this host is asked, of another it takes time to tell."""
    if holder is not None and holder.address.is_near():
        if holder.address.is_alive():
            _refuse(lock, holder)
        return
    sys.stdout.write(f"waiting   {lock} is of {_name(holder)}: for up to {SILENCE:g} s, whether it lives\n")
    sys.stdout.flush()
    last, until = _last_sign(lock), time.monotonic() + SILENCE
    while last is not None and time.monotonic() < until:
        time.sleep(BEAT / 4)
        if _last_sign(lock) not in (None, last):
            _refuse(lock, holder)


def _refuse(lock: Path, holder: Owner | None) -> None:
    raise UserError(
        f"{lock.parent} (--output_dir) is in use by the run of {_name(holder)}: choose another folder, or stop it "
        f"(touch {lock.parent / 'STOP'})"
    )


def _name(holder: Owner | None) -> str:
    return "an unknown host" if holder is None else str(holder.address)


def _last_sign(lock: Path) -> int | None:
    """When its run last gave a sign of life, None if it is gone. Opening makes network file systems ask the server."""
    with suppress(FileNotFoundError), lock.open() as file:
        return os.fstat(file.fileno()).st_mtime_ns
    return None


def _take_away(lock: Path, holder: Owner | None) -> None:
    """Remove the name of a run that was killed, but give back one that another run has put there meanwhile."""
    aside = lock.with_name(f".{LOCK}-{uuid.uuid4().hex}")
    with suppress(FileNotFoundError):
        lock.rename(aside)
        if Owner.read(aside) != holder:
            with suppress(FileExistsError):
                os.link(aside, lock)
        aside.unlink()


def _require_seen(run_folder: Path, owner: Owner, group: Any) -> None:
    """Refuse a folder that other hosts do not share."""
    blind = gather(None if _sees(run_folder, owner) else Address.own().host, group)
    for rank, host in enumerate(blind):
        if host is not None:
            raise UserError(
                f"rank {rank} on host {host} does not see the run folder {run_folder.absolute()} that rank 0 on host "
                f"{owner.address.host} has made: choose one that all hosts share (--output_dir)"
            )


def _sees(run_folder: Path, owner: Owner) -> bool:
    until = time.monotonic() + PATIENCE
    while Owner.read(run_folder / LOCK) != owner:
        if time.monotonic() > until:
            return False
        time.sleep(0.1)
    return True
