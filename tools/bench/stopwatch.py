"""What is measured in a training run, on its ranks: time by phase, memory, and the traffic of optimizer states."""

from __future__ import annotations

import cProfile
import pstats
import re
import time
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch._dynamo.utils import counters

import agsel
from agsel.errors import UserError
from agsel.planning.flops import flops_per_token
from tools.bench.configurations import Configuration
from tools.bench.device import allocated, device, elapsed, moment, peak, pinned, reset_peak, synchronize

PROFILED_STEPS = 3
CALLBACKS = r"agsel/(training|monitor)/"
"""Where the code is whose time is told apart in a profile: what watches a run."""
COMPILED_WARMUP, QUIET_STEPS, LONGEST_WARMUP = 8, 4, 40
"""With compiled layers: at least so many warm-up steps, the last of them without a new graph, and at most so many."""


@dataclass(frozen=True)
class Settings:
    """How to measure; equal for all configurations of a launch."""

    steps: int
    warmup: int
    profile: bool
    folder: Path


@dataclass(frozen=True)
class Measurement:
    """What one rank measured: milliseconds, bytes of PyTorch's allocator, bytes and milliseconds per step.

    Attributes:
        ms_per_step: median; `ms_p10` and `ms_p90` are percentiles, the phases (None if not told apart) medians.
        baseline_bytes: allocated before the configuration began: what its predecessors leaked.
        initial_peak_bytes: peak until training could begin.
        first_peak_bytes: peak of the first step.
        peak_bytes: peak in training; without the warm-up, where layers compile.
        steady_bytes: allocated after the last step.
        pinned_bytes: page-locked host memory in use.
        moved_bytes_per_step: optimizer states copied, both directions.
        exposed_ms: mean time per step that the compute stream waited for optimizer states; None without agsel. What
            the host waits is not in it: compare with a run whose states stay, as tools/bench_scaling.py does.
        flops_per_token: arithmetic of full fine-tuning.
        graphs: compiled by dynamo; `recompilations`, those of them in the measured steps.
    """

    ms_per_step: float
    ms_p10: float
    ms_p90: float
    forward_ms: float | None
    backward_ms: float | None
    step_ms: float | None
    baseline_bytes: int
    initial_peak_bytes: int
    first_peak_bytes: int
    peak_bytes: int
    steady_bytes: int
    pinned_bytes: int
    moved_bytes_per_step: float
    exposed_ms: float | None
    startup_seconds: float
    flops_per_token: float
    warmup_steps: int
    graphs: int
    recompilations: int


class Stopwatch:
    """Watches one training run: warm-up, measured steps, then profiled ones if asked for.

    Moments are CUDA events on the compute stream, so that nothing waits for the host before the last measured step.
    """

    def __init__(self, configuration: Configuration, settings: Settings) -> None:
        self._configuration, self._settings = configuration, settings
        self._started = time.perf_counter()
        self._steps = 0
        self._warmup: int | None = None
        self._last_new_graph = 0
        self._graphs = 0
        self._waits: list[tuple[Any, Any]] = []
        self._moments: list[tuple[str, Any]] = []
        self._profiler = cProfile.Profile()
        self.measurement: Measurement | None = None
        synchronize()
        self._baseline = allocated()
        reset_peak()

    def begin(self, model: nn.Module, selection: agsel.Selection | None) -> None:
        """Training can begin: the engine is built, agsel attached."""
        synchronize()
        self._startup = time.perf_counter() - self._started
        self._initial_peak = peak()
        reset_peak()
        self._flops = flops_per_token(model, self._configuration.sequence)
        self._selection = selection
        self._residency: Any = selection and selection.residency
        if self._residency is not None:
            self._watch_waits()

    def mark(self, phase: str) -> None:
        """A phase of the step ends here."""
        self._moments.append((phase, moment()))

    def end_of_step(self) -> None:
        """A step ends here, right after its last `mark`."""
        self._steps += 1
        if self._steps == 1:
            self._first_peak = peak()
        if self._warmup is None:
            self._end_warmup()
        elif self._steps == self._warmup + self._settings.steps:
            self.measurement = self._conclude()
            if self._is_profiling:
                self._profiler.enable()
        if self.finished and self._is_profiling:
            self._write_profile()

    @property
    def finished(self) -> bool:
        """Whether no further step is wanted."""
        extra = PROFILED_STEPS if self._settings.profile else 0
        return self._warmup is not None and self._steps >= self._warmup + self._settings.steps + extra

    @property
    def _is_profiling(self) -> bool:
        return self._settings.profile and dist.get_rank() == 0

    def _end_warmup(self) -> None:
        compiled = self._configuration.compile
        if compiled and self._any_rank_compiled():
            self._last_new_graph = self._steps
        shortest = max(self._settings.warmup, COMPILED_WARMUP) if compiled else self._settings.warmup
        quiet = not compiled or self._steps >= min(self._last_new_graph + QUIET_STEPS, LONGEST_WARMUP)
        if self._steps < shortest or not quiet:
            return
        self._warmup = self._steps
        del self._moments[:-1], self._waits[:]
        self._moved = self._residency.moved_bytes if self._residency is not None else 0
        if compiled:
            reset_peak()

    def _any_rank_compiled(self) -> bool:
        graphs = counters["stats"]["unique_graphs"]
        new = torch.tensor(float(graphs != self._graphs), device=device())
        self._graphs = graphs
        dist.all_reduce(new, op=dist.ReduceOp.MAX)
        return bool(new)

    def _conclude(self) -> Measurement:
        self._require_no_skipped_step()
        synchronize()
        steps, residency = self._settings.steps, self._residency
        graphs = counters["stats"]["unique_graphs"]
        return Measurement(
            **self._times(),
            baseline_bytes=self._baseline,
            initial_peak_bytes=self._initial_peak,
            first_peak_bytes=self._first_peak,
            peak_bytes=peak(),
            steady_bytes=allocated(),
            pinned_bytes=pinned() + self._locked_homes(),
            moved_bytes_per_step=(residency.moved_bytes - self._moved) / steps if residency else 0.0,
            exposed_ms=sum(elapsed(*pair) for pair in self._waits) / steps if residency else None,
            startup_seconds=self._startup,
            flops_per_token=self._flops,
            warmup_steps=self._warmup or 0,
            graphs=graphs,
            recompilations=graphs - self._graphs if self._configuration.compile else 0,
        )

    def _times(self) -> dict[str, Any]:
        """Milliseconds of the measured steps; of their phases None where these are not told apart."""
        moments = [at for _, at in self._moments]
        milliseconds = np.array([elapsed(*pair) for pair in pairwise(moments)]).reshape(self._settings.steps, -1)
        names = np.array([phase for phase, _ in self._moments[1 : 1 + milliseconds.shape[1]]])
        medians = {name: float(np.median(milliseconds[:, names == name].sum(1))) for name in set(names)}
        totals = milliseconds.sum(1)
        return {
            "ms_per_step": float(np.median(totals)),
            "ms_p10": float(np.percentile(totals, 10)),
            "ms_p90": float(np.percentile(totals, 90)),
            **{f"{phase}_ms": medians.get(phase) for phase in ("forward", "backward", "step")},
        }

    def _require_no_skipped_step(self) -> None:
        """A skipped step is a quick one.

        Raises:
            UserError: on every rank, as the ranks skip together.
        """
        if self._selection is not None and self._selection.policy.step < self._steps:
            skipped = self._steps - self._selection.policy.step
            raise UserError(f"{skipped} of {self._steps} steps were skipped: their gradients were not finite")

    def _locked_homes(self) -> int:
        """Page-locked bytes of evicted states, which agsel does not take from PyTorch's allocator."""
        homes = [partition.home for partition in self._residency.partitions] if self._residency else []
        return sum(home.nbytes for home in homes if home is not None and home.is_pinned())

    def _watch_waits(self) -> None:
        wait_for = self._residency.wait_for

        def watched(partition: Any) -> None:
            before = moment()
            wait_for(partition)
            self._waits.append((before, moment()))

        self._residency.wait_for = watched

    def _write_profile(self) -> None:
        self._profiler.disable()
        name = re.sub(r"[^\w.%]+", "-", f"{self._configuration.setting}, {self._configuration.label}")
        with (self._settings.folder / f"profile-{name}.txt").open("w") as file:
            for order in ("cumulative", "tottime"):
                pstats.Stats(self._profiler, stream=file).sort_stats(order).print_stats(40)
            pstats.Stats(self._profiler, stream=file).sort_stats("cumulative").print_stats(CALLBACKS)
