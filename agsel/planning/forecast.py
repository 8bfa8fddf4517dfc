"""Step times of a run on any number of GPUs, and how many are too many for AdaGradSelect and its relatives to pay."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from agsel.planning.duration import Speeds, StepTime, bytes_sent, step_time
from agsel.planning.memory import PlannedStep, Planner
from agsel.planning.rehearsal import Trace
from agsel.planning.traffic import Cluster, Sent

LEAST_SHARE = 0.05
"""What a step must save of the time of full fine-tuning to pay. And what the optimizer states of all blocks must take
of a GPU's memory for it to matter where they are."""
MOST_RANKS = 2**17


@dataclass(frozen=True)
class Foreseen:
    """A kind of step.

    Attributes:
        time: it takes.
        sent: to other GPUs, by each.
        moved: bytes of optimizer states that a GPU fetches; as many leave it.
    """

    time: StepTime
    sent: Sent
    moved: float


class Forecast:
    """The steps of a run, rehearsed once; the batch of each GPU stays as it is.

    Args:
        planner: of the run.
        blocks_per_step: that are updated.
        kinds: of steps; full fine-tuning is compared with the last of the others.
        speeds: of the hardware.
        accumulation: micro-batches per step.
    """

    def __init__(
        self,
        planner: Planner,
        blocks_per_step: int,
        kinds: Sequence[PlannedStep],
        speeds: Speeds,
        accumulation: int = 1,
    ) -> None:
        self._traces: Mapping[PlannedStep, Trace] = {kind: planner.trace(kind, blocks_per_step) for kind in kinds}
        self._moved = planner.ranks * planner.moved_by_new_choice(blocks_per_step)
        self._states = planner.ranks * planner.states
        self._speeds, self._accumulation = speeds, accumulation

    def step(self, kind: PlannedStep, cluster: Cluster) -> Foreseen:
        """A kind of step on a cluster of several GPUs, or of one if that was rehearsed."""
        trace = self._traces[kind]
        moved = 0.0 if trace.stock else self._moved / cluster.ranks
        return Foreseen(
            step_time(
                trace,
                cluster,
                self._speeds,
                accumulation=self._accumulation,
                moved=moved,
                explores=kind == "explore",
            ),
            bytes_sent(trace, cluster, self._accumulation),
            moved,
        )

    def saving(self, cluster: Cluster) -> float:
        """Share of the time of full fine-tuning that the method's last kind of step saves."""
        *_, last = (kind for kind in self._traces if kind != "full")
        return 1 - self.step(last, cluster).time.total / self.step("full", cluster).time.total

    def pays_up_to(self, ranks_per_host: int) -> int | None:
        """The most GPUs, doubled from one host's on, up to which it saves enough; None if it does at all tried."""
        ranks = ranks_per_host
        while ranks <= MOST_RANKS:
            if self.saving(Cluster(ranks=ranks, ranks_per_host=ranks_per_host)) < LEAST_SHARE:
                return ranks // 2 if ranks > ranks_per_host else 0
            ranks *= 2
        return None

    def states_small_from(self, gpu_bytes: float) -> int:
        """The number of GPUs from which on the optimizer states of all blocks take little of each."""
        return -int(-self._states // (LEAST_SHARE * gpu_bytes))
