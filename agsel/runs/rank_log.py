"""What a rank prints, also in a file of the run folder: there it is when the launcher or the terminal is gone.

`logs/rank-N.log` goes on over resumes. Each time its first line says when and where the rank began, and its last line
how it ended: a rank without that line was killed.
"""

from __future__ import annotations

import faulthandler
import os
import threading
import traceback
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from queue import SimpleQueue
from types import TracebackType
from typing import NoReturn

from agsel.errors import UserError
from agsel.runs.address import Address

FOLDER = "logs"
BEGAN, ENDED, ASKED = "== began", "== ended", "== asked to stop"
"""How lines begin that are not of the output."""
PATIENCE = 2.0
"""Seconds that the end waits for a file system that does not answer."""


class RankLog:
    """Receives what a rank prints. What comes before the file is opened is kept for it.

    Writing is left to a thread: nobody waits for a network file system, least of all a rank that ends because of it.
    """

    def __init__(self) -> None:
        self._queue: SimpleQueue[str | None] = SimpleQueue()
        self._file: int | None = None
        self._process = os.getpid()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> RankLog:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if error is not None and not isinstance(error, SystemExit):
            self.write("".join(traceback.format_exception(error)))
        self.close(error.code if isinstance(error, SystemExit) else int(error is not None))

    def open(self, run_folder: Path) -> None:
        """Write from here on into the log of this rank. No other run may be in the folder.

        Raises:
            UserError: the file cannot be written.
        """
        rank, size = os.environ["RANK"], os.environ["WORLD_SIZE"]
        path = run_folder / FOLDER / f"rank-{rank}.log"
        try:
            path.parent.mkdir(exist_ok=True)
            file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
            os.write(file, f"{BEGAN} {_now()}, rank {rank} of {size}, {Address.own()}\n".encode())
        except OSError as error:
            raise UserError(f"cannot write the log of a rank, {error}: make {path.parent} writable") from error
        self._file, self._process = file, os.getpid()
        self._thread = threading.Thread(target=self._write_all, args=(file,), name="agsel-log", daemon=True)
        self._thread.start()
        faulthandler.enable(file)

    def write(self, text: str) -> None:
        """Write at once, or when the file is open. A full disk loses it."""
        if self._file is not None and os.getpid() != self._process:  # forked off, without the thread
            _append(self._file, text)
        else:
            self._queue.put(text)

    def close(self, code: object) -> None:
        """Write the last line, and no more."""
        self._queue.put(f"{ENDED} {_now()}, exit code {code}\n")
        self._queue.put(None)
        if self._thread is not None:
            self._thread.join(PATIENCE)
            faulthandler.disable()
            self._file = self._thread = None

    def _write_all(self, file: int) -> None:
        while (text := self._queue.get()) is not None:
            _append(file, text)


LOG = RankLog()
"""Of this process."""


def end_process(code: int) -> NoReturn:
    """End at once, from any thread, with the last line of the log."""
    LOG.close(code)
    os._exit(code)


def _append(file: int, text: str) -> None:
    with suppress(OSError):
        os.write(file, text.encode(errors="backslashreplace"))


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
