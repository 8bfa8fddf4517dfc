"""Gradient-guided selection at every step: the preliminary method of the AdaGradSelect paper (arXiv 2512.15764)."""

from __future__ import annotations

from dataclasses import dataclass

from agsel.policies.policy import FractionPolicy, Plan, StepKind


@dataclass(kw_only=True)
class TopK(FractionPolicy):
    """Update the k blocks with the largest global gradient norm; every step computes every block's gradient."""

    method = "topk"
    rule = "largest gradient norms at every step"

    @property
    def kinds_of_steps(self) -> tuple[StepKind, ...]:
        """Every step explores."""
        return ("explore",)

    def make_plan(self) -> Plan:
        """All blocks; their norms decide."""
        return self.explore_all()
