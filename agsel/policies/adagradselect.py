"""AdaGradSelect (arXiv 2512.15764, Algorithm 2): explore by gradient norm, exploit by how often a block was chosen."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np

from agsel.policies.policy import FractionPolicy, Plan


@dataclass(kw_only=True)
class AdaGradSelect(FractionPolicy):
    """ε-greedy block selection.

    During the first `explore_steps` steps (the paper: epoch 1), with probability ε a step *explores*: every block gets
    a gradient and the k blocks with the largest global gradient norm are updated. All other steps *exploit*: the k
    largest components of p ~ Dirichlet(counts + δ) are updated, known before the forward.

    Attributes:
        explore_steps: length of the exploration phase in optimizer steps; 0 never explores.
        epsilon_start: ε at step 0. ε_t = epsilon_start * exp(-λ t), with λ such that ε reaches epsilon_end at the end
            of the phase; afterwards ε is 0. The paper says only that ε "starts high" and decays exponentially.
        epsilon_end: ε at the end of the phase.
        dirichlet_delta: δ, the smoothing of the counts. Not given by the paper; 1 makes the first draw uniform.
        draw: `"topk"` updates the k largest components of p; `"sample"` draws k blocks without replacement from p.
            Sources on the paper differ; `"topk"` is the authors' own wording.

    Raises:
        ValueError: a setting is out of its range.
    """

    explore_steps: int
    epsilon_start: float = 1.0
    epsilon_end: float = 0.05
    dirichlet_delta: float = 1.0
    draw: Literal["topk", "sample"] = "topk"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.explore_steps < 0:
            raise ValueError(f"explore_steps must be 0 or more, got {self.explore_steps} (--explore_steps)")
        if not 0 < self.epsilon_end <= self.epsilon_start <= 1:
            raise ValueError(
                f"need 0 < epsilon_end <= epsilon_start <= 1, got {self.epsilon_end} and {self.epsilon_start} "
                "(--epsilon_end, --epsilon_start)"
            )
        if not 0 < self.dirichlet_delta < math.inf:
            raise ValueError(f"dirichlet_delta must be above 0, got {self.dirichlet_delta} (--dirichlet_delta)")
        if self.draw not in ("topk", "sample"):
            raise ValueError(f"draw must be 'topk' or 'sample', got {self.draw!r} (--dirichlet_draw)")

    @property
    def epsilon(self) -> float:
        """ε of the current step."""
        if self.step >= self.explore_steps:
            return 0.0
        decay = math.log(self.epsilon_start / self.epsilon_end) / self.explore_steps
        return self.epsilon_start * math.exp(-decay * self.step)

    def _draw_plan(self) -> Plan:
        epsilon = self.epsilon
        if epsilon > 0 and self._generator.random() < epsilon:
            return self._explore_all()
        return Plan(explore=False, blocks=self._exploit())

    def _exploit(self) -> tuple[int, ...]:
        alpha = np.asarray(self.counts) + self.dirichlet_delta
        # p ~ Dirichlet(alpha) is normalised Gamma(alpha) draws. They are drawn as logarithms, by
        # Gamma(alpha) = Gamma(alpha + 1) * U^(1 / alpha): p itself underflows when δ is small, and ties between its
        # zeros would go to the first blocks.
        log_weights = np.log(self._generator.standard_gamma(alpha + 1))
        log_weights -= self._generator.standard_exponential(len(alpha)) / alpha
        if self.draw == "sample":
            log_weights += self._generator.gumbel(size=len(alpha))  # k draws without replacement from p
        return self._largest(log_weights)
