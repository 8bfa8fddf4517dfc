"""Output that nobody reads any more, as of a terminal that was closed, stops a run instead of breaking it."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TextIO, cast


@contextmanager
def outliving_output(note: Callable[[str], None]) -> Iterator[None]:
    """While inside, what is written to a pipe or terminal that is gone is lost, and nothing else.

    Args:
        note: is told why the run should stop, when that happens.
    """
    streams = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = (cast(TextIO, _Outliving(stream, note)) for stream in streams)
    try:
        yield
    finally:
        sys.stdout, sys.stderr = streams


class _Outliving:
    """A stream whose errors are noted, after which it leads nowhere."""

    def __init__(self, stream: TextIO, note: Callable[[str], None]) -> None:
        self._stream, self._note = stream, note

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Write, or pretend to."""
        with self._losing():
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        """Flush, or pretend to."""
        with self._losing():
            self._stream.flush()

    @contextmanager
    def _losing(self) -> Iterator[None]:
        try:
            yield
        except BlockingIOError:  # the reader is slow, not gone
            raise
        except OSError as error:
            self._note(f"the output is lost ({error.strerror})")
            self._lead_nowhere()

    def _lead_nowhere(self) -> None:
        """The file itself: logging holds the stream inside, and libraries in C write without it."""
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self._stream.fileno())
        os.close(nowhere)
