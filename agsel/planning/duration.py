"""How long a step takes, from what its rehearsal computed and sent. A prediction: see the bench's README for measured.

GPU, Python and links work at the same time. In a phase, collectives hide behind what the GPU computes and Python
prepares, but for one of them: the first gather of a forward, the last reduction of a backward. In the optimizer step
nothing hides.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, replace

from agsel.planning.rehearsal.trace import Collective, Phase, Trace
from agsel.planning.traffic import Cluster, Sent, sent, transfer_seconds

ADAM_BYTES = 46
"""Read and written per parameter of a rank's share: master and moments (24), its gradient from 16 bits to fp32, divided
and used (20), the new weight (2)."""
LATE = 2 / 3
"""Of an exploring step's backward: what is left of it when states are fetched, as `agsel.zero.timetable.late` says."""
MOST_KERNELS_PER_SECOND = 1 / 60e-6
"""What Python launches; measured, like the following seconds, on the hosts of tools/bench/README.md."""
GRADIENT, STOCK_GRADIENT = 0.18e-3, 0.37e-3
"""Seconds of Python for each weight's gradient: agsel notes it for a reduction, stock DeepSpeed copies it."""
STOCK_STEP_GRADIENT, STEP = 0.13e-3, 5e-3
"""In the optimizer step: stock DeepSpeed's seconds for each weight, agsel's for all."""
COLLECTIVE = 0.3e-3
"""Seconds of Python for each collective of forward and backward."""
HOOK, HOOK_ALONE = 0.4e-3, 0.25e-3
"""Seconds of Python when a module is entered and left at ZeRO-3, on several ranks and on one."""
PROVIDED, PROVIDED_ALONE = 0.3e-3, 0.25e-3
"""And for each of its weights that is made available and given up."""


@dataclass(frozen=True, kw_only=True)
class Speeds:
    """Of one GPU and what surrounds it.

    Attributes:
        flops: floating point operations per second of large matrix products.
        memory: bytes per second from and to its own memory.
        link: bytes per second to GPUs of its host, each way.
        network: bytes per second to other hosts, each way.
        host: bytes per second from and to host memory, each way.
        slowness: what GPU and Python take on this machine, as a multiple.
    """

    flops: float = 0.5 * 989e12
    memory: float = 3e12
    link: float = 360e9
    network: float = 45e9
    host: float = 22e9
    slowness: float = 1.0


def host_speed(ranks_per_host: int) -> float:
    """Bytes per second each way between each GPU and host memory, if so many do it at once: measured on H200 hosts."""
    return next(speed for ranks, speed in ((1, 51e9), (2, 37e9), (math.inf, 22e9)) if ranks_per_host <= ranks)


@dataclass(frozen=True, kw_only=True)
class PhaseTime:
    """Seconds of a phase.

    Attributes:
        gpu: computing.
        python: preparing it, at the same time.
        sending: in collectives.
        exposed: of which neither GPU nor Python has anything to do.
    """

    gpu: float
    python: float
    sending: float
    exposed: float

    @property
    def total(self) -> float:
        """From beginning to end."""
        return max(self.gpu, self.python) + self.exposed


@dataclass(frozen=True, kw_only=True)
class StepTime:
    """Seconds of an optimizer step.

    Attributes:
        forward: of all micro-batches, like `backward`.
        backward: its reductions hide behind it.
        step: of the optimizer.
        moving: optimizer states, in and out at the same time, behind forward and backward.
        waiting: for these.
    """

    forward: PhaseTime
    backward: PhaseTime
    step: PhaseTime
    moving: float
    waiting: float

    @property
    def total(self) -> float:
        """From beginning to end."""
        return self.forward.total + self.backward.total + self.step.total + self.waiting

    @property
    def exposed(self) -> float:
        """Waiting for collectives."""
        return self.forward.exposed + self.backward.exposed + self.step.exposed


def step_time(
    trace: Trace, cluster: Cluster, speeds: Speeds, *, accumulation: int = 1, moved: float = 0, explores: bool = False
) -> StepTime:
    """Predict a step.

    Args:
        trace: of one micro-batch and the optimizer step.
        cluster: of the ranks; another number than was rehearsed, if both or none are more than one.
        speeds: of the hardware.
        accumulation: micro-batches per step.
        moved: bytes of optimizer states that a GPU fetches, while as many leave it.
        explores: which ones is known in the backward only.
    """
    forward = _micro_batches(trace, "forward", cluster, speeds, accumulation)
    backward = _micro_batches(trace, "backward", cluster, speeds, accumulation)
    moving = moved / speeds.host
    beside = LATE * backward.total / accumulation if explores else forward.total + backward.total
    return StepTime(
        forward=forward,
        backward=backward,
        step=_optimizer_step(trace, cluster, speeds),
        moving=moving,
        waiting=max(0.0, moving - beside),
    )


def bytes_sent(trace: Trace, cluster: Cluster, accumulation: int = 1) -> Sent:
    """What each GPU sends in a step."""
    return sum(
        (sent(one, cluster) * (count * times(one, accumulation)) for one, count in trace.collectives.items()), Sent()
    )


def times(collective: Collective, accumulation: int) -> int:
    """How often a collective of a micro-batch takes place in a step."""
    return accumulation if collective.every_micro_batch and collective.phase != "step" else 1


def calibrated(trace: Trace, cluster: Cluster, speeds: Speeds, seconds: float, accumulation: int = 1) -> Speeds:
    """The speeds with the slowness with which a step of stock DeepSpeed takes as long as was measured."""
    low, high = 0.0, 1.0
    while _total(trace, cluster, replace(speeds, slowness=high), accumulation) < seconds:
        high *= 2
    for _ in range(60):
        middle = (low + high) / 2
        faster = _total(trace, cluster, replace(speeds, slowness=middle), accumulation) < seconds
        low, high = (middle, high) if faster else (low, middle)
    return replace(speeds, slowness=high)


def _total(trace: Trace, cluster: Cluster, speeds: Speeds, accumulation: int) -> float:
    return step_time(trace, cluster, speeds, accumulation=accumulation).total


def _micro_batches(trace: Trace, phase: Phase, cluster: Cluster, speeds: Speeds, accumulation: int) -> PhaseTime:
    kernels = trace.kernels.get(phase, Counter())
    gpu = sum(count * max(flops / speeds.flops, nbytes / speeds.memory) for (flops, nbytes), count in kernels.items())
    collectives = {one: count for one, count in trace.collectives.items() if one.phase == phase}
    python = sum(kernels.values()) / MOST_KERNELS_PER_SECOND + COLLECTIVE * sum(collectives.values())
    hook, provided = (HOOK, PROVIDED) if cluster.ranks > 1 else (HOOK_ALONE, PROVIDED_ALONE)
    python += (trace.hooked * hook + trace.provided * provided) / 2
    if phase == "backward":
        python += trace.gradients * (STOCK_GRADIENT if trace.stock else GRADIENT)
    gpu, python = (accumulation * speeds.slowness * seconds for seconds in (gpu, python))
    sending = _sending(collectives, cluster, speeds, accumulation)
    number = sum(count * times(one, accumulation) for one, count in collectives.items())
    exposed = max(sending / number, sending - max(gpu, python)) if number else 0.0
    return PhaseTime(gpu=gpu, python=python, sending=sending, exposed=exposed)


def _optimizer_step(trace: Trace, cluster: Cluster, speeds: Speeds) -> PhaseTime:
    collectives = {one: count for one, count in trace.collectives.items() if one.phase == "step"}
    sending = _sending(collectives, cluster, speeds, 1)
    return PhaseTime(
        gpu=speeds.slowness * trace.updated / cluster.ranks * ADAM_BYTES / speeds.memory,
        python=speeds.slowness * (trace.gradients * STOCK_STEP_GRADIENT if trace.stock else STEP),
        sending=sending,
        exposed=sending,
    )


def _sending(collectives: dict[Collective, int], cluster: Cluster, speeds: Speeds, accumulation: int) -> float:
    return sum(
        count * times(one, accumulation) * transfer_seconds(one, cluster, speeds.link, speeds.network)
        for one, count in collectives.items()
    )
