"""What a rehearsed step computes and sends: the material for predicting how long it takes."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Literal

Phase = Literal["forward", "backward", "step"]
Operation = Literal["all-gather", "reduce-scatter", "all-reduce"]


@dataclass(frozen=True)
class Collective:
    """An exchange between all ranks.

    Attributes:
        operation: what is exchanged.
        nbytes: of the whole, before it is divided among the ranks or after it is put together.
        phase: of the step.
        every_micro_batch: or once per optimizer step.
    """

    operation: Operation
    nbytes: int
    phase: Phase
    every_micro_batch: bool = True


@dataclass
class Trace:
    """One micro-batch and the optimizer step after it.

    Attributes:
        kernels: how often a GPU does so many floating point operations over so many bytes in one go, by phase.
        collectives: how often each takes place.
        updated: parameters that the optimizer steps, on all ranks together.
        gradients: that DeepSpeed's hooks receive in a backward.
        hooked: how often ZeRO-3's hooks see a module entered and left, by forward or backward.
        provided: how often a weight of these is made available and given up.
        stock: DeepSpeed without agsel.
    """

    kernels: dict[Phase, Counter[tuple[int, int]]] = field(default_factory=dict)
    collectives: Counter[Collective] = field(default_factory=Counter)
    updated: int = 0
    gradients: int = 0
    hooked: int = 0
    provided: int = 0
    stock: bool = False

    def compute(self, phase: Phase, flops: int, nbytes: int) -> None:
        """Note a kernel."""
        self.kernels.setdefault(phase, Counter())[flops, nbytes] += 1

    def exchange(self, collective: Collective) -> None:
        """Note a collective; an empty one does not take place."""
        if collective.nbytes:
            self.collectives[collective] += 1

    def flops(self, phase: Phase) -> int:
        """Floating point operations of a phase."""
        return sum(flops * count for (flops, _), count in self.kernels.get(phase, Counter()).items())
