"""Output that nobody reads any more, as of a terminal that was closed, stops a run instead of breaking it.

Whatever becomes of it, a copy goes elsewhere.
"""

from __future__ import annotations

import logging
import os
import select
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TextIO, cast


@contextmanager
def outliving_output(note: Callable[[str], None], copy: Callable[[str], None]) -> Iterator[None]:
    """While inside, what is written to a pipe or terminal that is gone is lost, and nothing else.

    Args:
        note: is told why the run should stop, when that happens.
        copy: gets all that is written by way of Python.
    """
    streams = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = outliving = [cast(TextIO, _Outliving(stream, note, copy)) for stream in streams]
    _redirect_logging(dict(zip(streams, outliving, strict=True)))
    try:
        yield
    finally:
        _redirect_logging(dict(zip(outliving, streams, strict=True)))
        sys.stdout, sys.stderr = streams


def is_output_gone() -> bool:
    """Whether nobody can read any more what this process prints, without printing."""
    poll = select.poll()
    poll.register(1, 0)
    return any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))


def _redirect_logging(streams: dict[TextIO, TextIO]) -> None:
    """Libraries that were imported before hold the streams of that time."""
    loggers = [logging.getLogger(name) for name in logging.root.manager.loggerDict]
    for handler in (handler for logger in [logging.root, *loggers] for handler in logger.handlers):
        own = vars(handler).get("stream")  # not that of handlers which look for sys.stderr each time
        if isinstance(handler, logging.StreamHandler) and own in streams:
            handler.setStream(streams[own])


class _Outliving:
    """A stream whose errors are noted, after which it leads nowhere."""

    def __init__(self, stream: TextIO, note: Callable[[str], None], copy: Callable[[str], None]) -> None:
        self._stream, self._note, self._copy = stream, note, copy

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Write, or pretend to."""
        with self._losing():
            self._stream.write(text)
        self._copy(text)
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
