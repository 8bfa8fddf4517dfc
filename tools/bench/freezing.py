"""FreezeOut's steps, which get shorter as its run goes on: measured at some moments, and what the whole run takes."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

import agsel
from agsel.policies.policy import FractionPolicy, Plan

MOMENTS = 1000
"""Of a run, over which its steps are averaged."""


class UpperLayers(FractionPolicy):
    """One moment of FreezeOut for ever: the highest layers train, those below have frozen adapters."""

    def make_plan(self) -> Plan:
        """The upper fraction of the layers."""
        return Plan.of(range(self.number_of_blocks - self.blocks_per_step, self.number_of_blocks))


def mean_of_a_run(times: Mapping[float, float]) -> float | None:
    """Milliseconds per step of a run of `--method freezeout`, as it is by default.

    Args:
        times: ms per step by the fraction of the layers that is still trained; between them it is interpolated.

    Returns:
        None if they do not reach from all layers to those that train in the end.
    """
    if not times or max(times) < 1 or min(times) > 1 - agsel.FreezeOut.freeze_most:
        return None
    shares = (np.arange(MOMENTS) + 0.5) / MOMENTS
    trained = 1 - np.minimum(shares**agsel.FreezeOut.freeze_power, agsel.FreezeOut.freeze_most)
    fractions = sorted(times)
    return float(np.interp(trained, fractions, [times[fraction] for fraction in fractions]).mean())
