"""Which run takes place when and where: as many at once as slots and memory allow."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass

from tools.comparison.places import Place
from tools.comparison.plan import BEFORE, Run
from tools.comparison.records import Record
from tools.comparison.runs import Task

CONTEXT_BYTES = 1.5e9
"""What a process holds on a GPU beside what PyTorch counts: CUDA itself, its libraries, their kernels."""

Perform = Callable[[Task, Place, int], Record]


@dataclass(frozen=True)
class Outcome:
    """What came of a task.

    Attributes:
        seconds: that it took.
        at_once: runs that went on when it ended, it included.
    """

    task: Task
    record: Record
    seconds: float
    at_once: int


class Schedule:
    """Hands tasks to places, each as soon as one has room for it.

    A run needs what its cell was measured to need. What was not measured yet is taken to need the largest peak so far,
    and at least its share of the place, as the plan says that so many fit. A run that finds no memory beside others is
    tried once more on a place of its own.

    Args:
        places: where runs take place.
        runs_per_place: at once, at most.
        until: of the monotonic clock, when all must have ended: what would take longer does not begin.

    Attributes:
        left: tasks for which there was no time.
    """

    def __init__(self, places: Sequence[Place], runs_per_place: int, until: float = math.inf) -> None:
        self.left: list[Task] = []
        self._waiting: list[Task] = []
        self._until = until
        self._seconds: dict[str, float] = {}
        self._places = places
        self._slots = range(runs_per_place)
        self._peaks: dict[str, float] = {}
        self._alone: set[Run] = set()

    def note(self, record: Record) -> None:
        """Remember how much memory and time a run of this cell needs."""
        cell, seconds = record["cell"], record.get("seconds")
        if seconds and not record["error"]:
            self._seconds[cell] = max(seconds, self._seconds.get(cell, 0.0))
        peak = (record.get("result") or {}).get("peak_reserved_bytes")
        if peak is not None:
            self._peaks[record["cell"]] = max(peak + CONTEXT_BYTES, self._peaks.get(record["cell"], 0.0))

    def add(self, tasks: Iterable[Task]) -> None:
        """More to do, after those that wait; also between two outcomes of `perform`."""
        self._waiting += tasks

    def perform(self, work: Perform, stop: Callable[[], None]) -> Iterator[Outcome]:
        """Do all tasks for which there is time, in their order where memory allows, and say of each when it is done.

        Args:
            work: does one in a slot of a place, in a thread of its own.
            stop: ends those that go on when the time is up; they come to an end as tasks that are left.
        """
        running: dict[Future[Record], tuple[Task, Place, int, float]] = {}
        with ThreadPoolExecutor(max_workers=len(self._places) * len(self._slots)) as pool:
            while self._waiting or running:
                for task in list(self._waiting):
                    if time.monotonic() + self._expected(task.run) > self._until:
                        self._waiting.remove(task)
                        self.left.append(task)
                        continue
                    found = self._find(task.run)
                    if found is not None:
                        self._waiting.remove(task)
                        place, slot = found
                        place.running[slot] = task.run
                        running[pool.submit(work, task, place, slot)] = (task, place, slot, time.monotonic())
                at_once = len(running)
                patience = None if self._until == math.inf else max(0.0, self._until - time.monotonic())
                ended = wait(running, patience, FIRST_COMPLETED).done if running else ()
                if running and not ended:
                    stop()
                    ended = wait(running).done
                    self.left += [running[future][0] for future in ended if future.result()["error"]]
                    ended = {future for future in ended if not future.result()["error"]}
                    running = {future: running[future] for future in ended}
                for future in ended:
                    task, place, slot, begun = running.pop(future)
                    record = future.result()
                    self.note(record)
                    del place.running[slot]
                    if self._should_be_alone(task.run, record):
                        self._waiting.append(task)
                    else:
                        yield Outcome(task, record, time.monotonic() - begun, at_once)

    def _expected(self, run: Run) -> float:
        """Seconds: the longest of its cell so far, else the median of the cells; a guess, 0, for the very first."""
        trained = [seconds for cell, seconds in self._seconds.items() if cell != BEFORE]
        guess = 0.0 if run.is_untrained or not trained else statistics.median(trained)
        return self._seconds.get(run.cell, guess)

    def _find(self, run: Run) -> tuple[Place, int] | None:
        """The emptiest place with room for a run, and a free slot there."""
        for place in sorted(self._places, key=lambda place: len(place.running)):
            free = next((slot for slot in self._slots if slot not in place.running), None)
            if free is not None and self._fits(run, place):
                return place, free
        return None

    def _fits(self, run: Run, place: Place) -> bool:
        needed = sum(self._need(other, place) for other in (*place.running.values(), run))
        return not place.running or needed <= place.capacity

    def _need(self, run: Run, place: Place) -> float:
        if not place.gpus:
            return 0.0
        if run in self._alone:
            return place.capacity
        share = place.capacity / len(self._slots)
        return self._peaks.get(run.cell, max(share, *self._peaks.values(), 0.0))

    def _should_be_alone(self, run: Run, record: Record) -> bool:
        """Whether a run has found no memory where others might have taken it."""
        if "out of memory" not in (record["error"] or "") or run in self._alone or len(self._slots) == 1:
            return False
        self._alone.add(run)
        return True
