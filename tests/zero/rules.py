"""A selection rule from outside the package that uses every clause of the contract of `agsel.Policy`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from agsel.policies import FractionPolicy, Plan, Update


@dataclass(kw_only=True)
class EveryClause(FractionPolicy):
    """Of four steps, one measures only, one explores, one plans, starting some anew, one chooses among a few.

    The first block is updated whenever anything is, and its states never leave the device.
    """

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
