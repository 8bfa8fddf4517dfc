"""How long the compute stream has waited for optimizer states that were on their way."""

from __future__ import annotations

from itertools import takewhile
from typing import Any

import torch

from agsel.zero.residency import Partition, Residency


class Waits:
    """Watches every wait of a residency on a CUDA device, without making the host wait."""

    def __init__(self, residency: Residency) -> None:
        self._pairs: list[tuple[Any, Any]] = []
        self._milliseconds = 0.0
        wait_for = residency.wait_for

        def watched(partition: Partition) -> None:
            before = _now()
            wait_for(partition)
            self._pairs.append((before, _now()))

        residency.wait_for = watched  # type: ignore[method-assign]

    def collect(self) -> None:
        """Add up the waits that have ended, and forget them."""
        ended = list(takewhile(lambda pair: pair[1].query(), self._pairs))  # the device goes on while it is asked
        self._pairs = self._pairs[len(ended) :]
        self._milliseconds += sum(begin.elapsed_time(end) for begin, end in ended)

    def milliseconds(self) -> float:
        """Of the waits that have ended since the last call."""
        self.collect()
        milliseconds, self._milliseconds = self._milliseconds, 0.0
        return milliseconds


def _now() -> Any:
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event
