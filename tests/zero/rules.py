"""Selection rules from outside the package, which together use every clause of the contract of `agsel.Policy`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from agsel.policies import BAdam, BlockInfo, FractionPolicy, Grass, Ist, Lisa, Plan, Policy, Probe, Update
from agsel.policies.policy import StepKind

RULES: dict[str, partial[Policy]] = {
    "lisa": partial(Lisa, fraction=0.5, every=3, seed=5),
    "badam": partial(BAdam, every=3, seed=5),
    "grass": partial(Grass, fraction=0.5, every=2, probe_steps=2, refresh_every=8, seed=5),
    "ist": partial(Ist, fraction=0.5, seed=5),
}
"""Of the package, so short that a few steps show all that they do."""
STAGES_OF_RULES = (1, 2, 3) if torch.cuda.is_available() else (2, 3)
"""In tests whose answer does not depend on the rule at stage 1, which has the code of stage 2."""


@dataclass(kw_only=True)
class EveryClause(FractionPolicy):
    """Of four steps, one measures only, one explores, one plans, starting some anew, one chooses among a few.

    The first block is updated whenever anything is, and its states never leave the device.
    """

    @property
    def kinds_of_steps(self) -> tuple[StepKind, ...]:
        return ("probe", "explore", "exploit")

    @property
    def pinned(self) -> frozenset[int]:
        return frozenset({0})

    def make_plan(self) -> Plan:
        if self.step % 4 == 0:
            return Plan(self.explore_all().trainable, Update(frozenset()))
        if self.step % 4 == 1:
            return self.explore_all()
        if self.step % 4 == 2:
            drawn = self._draw(self.blocks_per_step)
            return Plan.of(self.pinned | drawn, fresh=drawn if self.step % 8 == 2 else self.pinned)
        return Plan(self.pinned | self._draw(2 * self.blocks_per_step), None)

    def choose(self, norms: Mapping[int, float]) -> Update:
        """Where nothing is planned: the smallest norms."""
        smallest = self.largest({block: -norm for block, norm in norms.items()})
        return self.plan().update or Update(self.pinned | smallest)

    def _draw(self, count: int) -> frozenset[int]:
        return frozenset(self._generator.choice(self.number_of_blocks, size=count, replace=False).tolist())


@dataclass(kw_only=True)
class Asking(FractionPolicy):
    """Before every third step, asks what the loss is without half of the adapters; trains the half that matters more.

    Attributes:
        answers: what it was told, by step.
    """

    factor: float = 0.25

    def start(self, blocks: Sequence[BlockInfo]) -> None:
        super().start(blocks)
        self.answers: dict[int, list[float]] = {}

    def probes(self) -> tuple[Probe, ...]:
        half = self.number_of_blocks // 2
        lower, upper = frozenset(range(half)), frozenset(range(half, self.number_of_blocks))
        return tuple(Probe(blocks, self.factor, rows=2) for blocks in (lower, upper)) if self.step % 3 == 0 else ()

    def observe(self, losses: Sequence[float]) -> None:
        self.answers[self.step] = list(losses)

    def make_plan(self) -> Plan:
        lower, upper = next(reversed(self.answers.values()))
        half = self.number_of_blocks // 2
        return Plan.of(range(half) if lower > upper else range(half, self.number_of_blocks))
