"""IST (arXiv 2410.11772): adapters of a few layers at each step, drawn by what the loss is without others."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from agsel.errors import UserError
from agsel.policies.policy import FRACTION_HELP, BlockInfo, FractionPolicy, Plan, Probe, drawn, setting

PROBE_EVERY = 10
SETS = 3
SUPPRESSED = 0.5
FACTOR = 0.25
ROWS = 16
LEARNING_RATE = 10
"""The constants of the authors' code: steps between probes, forwards of a probe, share of the layers whose adapters are
scaled, by which factor, rows of a forward, and the step size of the scores."""
TRIES = 10_000


@dataclass(kw_only=True)
class Ist(FractionPolicy):
    """Update the adapters of a share of the layers, drawn without replacement at each step from sigmoid(-s).

    s is a score of each layer, zero at first; **a high score means an unimportant layer**. Every 10 steps, three
    different halves of the layers are drawn from sigmoid(s), and the loss is computed with the adapters of each half
    scaled by 0.25. With the reward r = exp(-loss) less the mean of the three, and q = sigmoid(s) as it was before,
    s of every layer of a half grows by 10 r q (1 - q): what can be suppressed at little loss is drawn less often.

    The loss is the mean of those of all ranks before it becomes a reward, which so does not depend on their number if
    their rows have equally many learnt tokens.

    Attributes:
        fraction: share of the layers.

    Raises:
        UserError: a setting is out of its range.
    """

    method = "ist"
    rule = "adapters of layers, drawn by what the loss is without those of others"
    needs_adapters = True

    fraction: float = setting(0.25, flag="select_fraction", help=FRACTION_HELP)

    def start(self, blocks: Sequence[BlockInfo]) -> None:
        """Begin a run over these blocks.

        Raises:
            UserError: there is only one.
        """
        super().start(blocks)
        if len(blocks) < 2:
            raise UserError("ist compares halves of the layers, and there is only one: use another method (--method)")
        self.scores = [0.0] * len(blocks)
        self._halves: list[frozenset[int]] = []
        self._observed = 0

    def probes(self) -> tuple[Probe, ...]:
        """Every 10 steps a forward for each half."""
        if self.step == self._observed or self.step % PROBE_EVERY:
            return ()
        if not self._halves:
            self._halves = self._draw_halves()
        return tuple(Probe(half, FACTOR, ROWS) for half in self._halves)

    def observe(self, losses: Sequence[float]) -> None:
        """Change the scores, unless a loss is no number, as of rows without a learnt token."""
        rewards = np.exp(-np.asarray(losses))
        if np.isnan(rewards).any():
            rewards[:] = 0
        rewards -= rewards.mean()
        q = 1 / (1 + np.exp(-np.asarray(self.scores)))
        for reward, half in zip(rewards, self._halves, strict=True):
            for layer in half:
                self.scores[layer] += float(LEARNING_RATE * reward * q[layer] * (1 - q[layer]))
        self._halves, self._observed = [], self.step

    def make_plan(self) -> Plan:
        """Layers drawn from sigmoid(-s)."""
        return Plan.of(drawn(_log_sigmoid(-np.asarray(self.scores)), self.blocks_per_step, self._generator))

    def _draw_halves(self) -> list[frozenset[int]]:
        """Different from each other, as many as there are, or as are found."""
        size = int(SUPPRESSED * self.number_of_blocks)
        wanted = min(SETS, math.comb(self.number_of_blocks, size))
        halves: dict[frozenset[int], None] = {}
        for _ in range(TRIES):
            halves[drawn(_log_sigmoid(np.asarray(self.scores)), size, self._generator)] = None
            if len(halves) == wanted:
                break
        return list(halves)

    def state_dict(self) -> dict[str, Any]:
        """All that the next choice depends on, as plain Python values."""
        halves = [sorted(half) for half in self._halves]
        return super().state_dict() | {"scores": list(self.scores), "halves": halves, "observed": self._observed}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state_dict()`."""
        super().load_state_dict(state)
        self.scores, self._observed = list(state["scores"]), state["observed"]
        self._halves = [frozenset(half) for half in state["halves"]]


def _log_sigmoid(values: np.ndarray) -> np.ndarray:
    return -np.logaddexp(0, -values)
