"""Gradient-guided selection at every step: the preliminary method of the AdaGradSelect paper (arXiv 2512.15764)."""

from __future__ import annotations

from dataclasses import dataclass

from agsel.policies.policy import FractionPolicy, Plan


@dataclass(kw_only=True)
class TopK(FractionPolicy):
    """Update the k blocks with the largest global gradient norm; every step computes every block's gradient."""

    def _draw_plan(self) -> Plan:
        return self._explore_all()
