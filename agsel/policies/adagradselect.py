"""AdaGradSelect (arXiv 2512.15764, Algorithm 2): explore by gradient norm, exploit by how often a block was chosen."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from agsel.errors import UserError
from agsel.policies.policy import BlockInfo, FractionPolicy, Plan, StepKind, drawn, setting

SMALLEST_DELTA = 1e-300
"""Of a smaller one the inverse is no number."""


@dataclass(kw_only=True)
class AdaGradSelect(FractionPolicy):
    """ε-greedy block selection.

    During the first `explore_steps` steps (the paper: epoch 1), with probability ε a step *explores*: every block gets
    a gradient and the k blocks with the largest global gradient norm are updated. All other steps *exploit*: the k
    largest components of p ~ Dirichlet(counts + δ) are updated, known before the forward.

    Attributes:
        explore_steps: length of the exploration phase in optimizer steps, best those of epoch 1; 0 never explores. Left
            open, `complete` fills it in, which `launch/train.py` calls.
        epsilon_start: ε at step 0. ε_t = epsilon_start * exp(-λ t), with λ such that ε reaches epsilon_end at the end
            of the phase; afterwards ε is 0. The paper says only that ε "starts high" and decays exponentially.
        epsilon_end: ε at the end of the phase.
        dirichlet_delta: δ, the smoothing of the counts. Not given by the paper; 1 makes the first draw uniform.
        draw: `"topk"` updates the k largest components of p; `"sample"` draws k blocks without replacement from p.
            Sources on the paper differ; `"topk"` is the authors' own wording.

    Raises:
        UserError: a setting is out of its range.
    """

    method = "adagradselect"
    rule = "largest gradient norms while exploring, then Dirichlet draws over how often each block was chosen"

    spread_by = "raise --select_fraction, or spread the draws by --dirichlet_draw sample --dirichlet_delta 20"

    explore_steps: int | None = setting(
        None,
        help="Length of the exploration phase in optimizer steps. Default: those of the first epoch, as in the paper; "
        "0 never explores.",
    )
    epsilon_start: float = setting(
        1.0, help="Probability of exploring at the first step; decays exponentially from here."
    )
    epsilon_end: float = setting(
        0.05, help="Probability of exploring at the end of the exploration phase; 0 afterwards."
    )
    dirichlet_delta: float = setting(
        1.0,
        help="Added to every count before the Dirichlet draw. Larger values give rarely chosen blocks more chances; "
        "values near 0 lock on to the early winners.",
    )
    draw: Literal["topk", "sample"] = setting(
        "topk",
        flag="dirichlet_draw",
        help="`topk` updates the blocks with the largest drawn probabilities, `sample` draws blocks without "
        "replacement with these probabilities.",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.explore_steps is not None and self.explore_steps < 0:
            raise UserError(f"explore_steps must be 0 or more, got {self.explore_steps} (--explore_steps)")
        if not 0 < self.epsilon_end <= self.epsilon_start <= 1:
            raise UserError(
                f"need 0 < epsilon_end <= epsilon_start <= 1, got {self.epsilon_end} and {self.epsilon_start} "
                "(--epsilon_end, --epsilon_start)"
            )
        if not SMALLEST_DELTA <= self.dirichlet_delta < math.inf:
            raise UserError(
                f"dirichlet_delta must be above 0, at least {SMALLEST_DELTA:g}, got {self.dirichlet_delta} "
                "(--dirichlet_delta)"
            )
        if self.draw not in ("topk", "sample"):
            raise UserError(f"draw must be 'topk' or 'sample', got {self.draw!r} (--dirichlet_draw)")

    def complete(self, epoch_steps: int, run_steps: int) -> None:
        """Explore for the first epoch, unless told otherwise."""
        if self.explore_steps is None:
            self.explore_steps = min(epoch_steps, run_steps)

    def start(self, blocks: Sequence[BlockInfo]) -> None:
        """Begin a run over these blocks.

        Raises:
            UserError: the length of the exploration phase was left open.
        """
        if self.explore_steps is None:
            raise UserError("explore_steps is not given: set it, best to the number of optimizer steps of epoch 1")
        super().start(blocks)

    def remark(self, run_steps: int) -> str | None:
        """Whether the draw may keep to one block: its few early turns make it the likeliest of all, for ever."""
        if self.blocks_per_step > 1 or self.number_of_blocks == 1 or self.draw == "sample":
            return None
        return f"of {self.number_of_blocks} blocks one may have nearly all turns: {self.spread_by}"

    @property
    def kinds_of_steps(self) -> tuple[StepKind, ...]:
        """Exploring ones only if there is a phase for them."""
        return ("exploit",) if self.explore_steps == 0 else ("explore", "exploit")

    @property
    def epsilon(self) -> float:
        """ε of the current step."""
        steps = self.explore_steps or 0
        if self.step >= steps:
            return 0.0
        decay = math.log(self.epsilon_start / self.epsilon_end) / steps
        return self.epsilon_start * math.exp(-decay * self.step)

    def make_plan(self) -> Plan:
        """Explore with probability ε, else exploit."""
        epsilon = self.epsilon
        if epsilon > 0 and self._generator.random() < epsilon:
            return self.explore_all()
        return Plan.of(self._exploit())

    @property
    def concentration(self) -> np.ndarray:
        """The parameters of the Dirichlet distribution, by block."""
        return np.asarray(self.counts) + self.dirichlet_delta

    def _exploit(self) -> frozenset[int]:
        alpha = self.concentration
        # p ~ Dirichlet(alpha) is normalised Gamma(alpha) draws. They are drawn as logarithms, by
        # Gamma(alpha) = Gamma(alpha + 1) * U^(1 / alpha): p itself underflows when δ is small, and ties between its
        # zeros would go to the first blocks.
        log_weights = np.log(self._generator.standard_gamma(alpha + 1))
        log_weights -= self._generator.standard_exponential(len(alpha)) / alpha
        if self.draw == "sample":
            return drawn(log_weights, self.blocks_per_step, self._generator)
        return self.largest(dict(enumerate(log_weights)))
