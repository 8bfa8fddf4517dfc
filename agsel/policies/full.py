"""Full fine-tuning: every block, every step. The baseline on the same engine."""

from __future__ import annotations

from dataclasses import dataclass

from agsel.policies.policy import Plan, Policy


@dataclass(kw_only=True)
class FullFineTuning(Policy):
    """Update every block at every step."""

    def _draw_plan(self) -> Plan:
        return Plan(explore=False, blocks=tuple(range(self.number_of_blocks)))
