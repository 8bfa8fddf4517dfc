"""How far something long has come, and when it will be done: a bar on a terminal, else a line now and then."""

from __future__ import annotations

import sys
import time
from contextlib import AbstractContextManager
from datetime import timedelta
from typing import Any

from tqdm import tqdm

SECONDS_BETWEEN_LINES = 5.0


class Progress(AbstractContextManager["Progress"]):
    """Shown by one process; the others make it with `shown=False`.

    Args:
        what: is done, for example `evaluating`.
        total: amount of work.
        shown: whether to write anything.
    """

    def __init__(self, what: str, total: float, *, shown: bool = True) -> None:
        self._what, self._total, self._done = what, total, 0.0
        self._begin = self._last = time.monotonic()
        self._bar = tqdm(total=total, desc=what, bar_format=BAR) if shown and sys.stderr.isatty() else None
        self._writes_lines = shown and self._bar is None

    def advance(self, amount: float) -> None:
        """Some of the work has been done."""
        self._done += amount
        if self._bar is not None:
            self._bar.update(amount)
        now = time.monotonic()
        if self._writes_lines and now - self._last >= SECONDS_BETWEEN_LINES:
            self._last = now
            sys.stdout.write(f"{self.describe(now - self._begin)}\n")
            sys.stdout.flush()

    def describe(self, seconds: float) -> str:
        """For example `evaluating 37 %, 0:00:42 left`, after `seconds` of work."""
        left = timedelta(seconds=round(seconds * (self._total - self._done) / self._done))
        return f"{self._what} {self._done / self._total:.0%}, {left} left"

    def __exit__(self, *_: Any) -> None:
        if self._bar is not None:
            self._bar.close()


BAR = "{desc} {percentage:3.0f}%|{bar}| {elapsed} elapsed, {remaining} left"
