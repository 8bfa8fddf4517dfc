"""Full fine-tuning: every block, every step. The baseline on the same engine."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from agsel.policies.policy import Plan, Policy


@dataclass(kw_only=True)
class FullFineTuning(Policy):
    """Update every block at every step."""

    method = "full"
    rule = "every block at every step: full fine-tuning on the same engine"
    takes_part = "all"

    @classmethod
    def scope(cls, select_from: float) -> Literal["layers", "all"]:
        """All blocks, but from a layer on the layers alone."""
        return "layers" if select_from else cls.takes_part

    def make_plan(self) -> Plan:
        """All blocks."""
        return Plan.of(range(self.number_of_blocks))
