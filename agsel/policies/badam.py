"""BAdam (arXiv 2404.02827): one block after another, each for a number of Adam steps that start from zero moments."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from agsel.errors import UserError
from agsel.policies.policy import BlockInfo, Plan, Policy, setting

SHORTEST, LONGEST = 50, 100
"""Steps for which a block is trained, unless told otherwise (the authors' README)."""


@dataclass(kw_only=True)
class BAdam(Policy):
    """Update one block for K steps, then the next; after a round over all blocks the next round (Algorithm 1).

    Moments and step count of a block start anew whenever its turn comes, and are forgotten when it ends.

    Attributes:
        every: K. Left open, it becomes min(max(n / (B * D), 50), 100) with n rows, B rows a step and D blocks, which
            needs `complete`.
        order: of the blocks in a round: drawn for each round, first to last, or last to first.
        seed: of the draw.

    Raises:
        UserError: a setting is out of its range.
    """

    method = "badam"
    rule = "one layer for many steps, from zero moments, then the next"
    keeps_moments = False
    spread_by = "lower --select_every, or train for more steps"

    every: int | None = setting(
        None,
        flag="select_every",
        help="Steps for which a block is trained. Default: the steps of an epoch by the number of blocks, from 50 to "
        "100.",
    )
    order: Literal["random", "ascending", "descending"] = setting(
        "random", flag="block_order", help="Whose turn is next: `random` in each round, `ascending` or `descending`."
    )
    seed: int = setting(
        0,
        flag="selection_seed",
        follows="seed",
        help="Seed of the selection's own random generator. Default: `--seed`.",
    )

    def __post_init__(self) -> None:
        self._epoch_steps: int | None = None
        self._given = self.every
        if self.every is not None and self.every < 1:
            raise UserError(f"every must be 1 or more, got {self.every} (--select_every)")
        if self.order not in ("random", "ascending", "descending"):
            raise UserError(f"order must be random, ascending or descending, got {self.order!r} (--block_order)")
        if self.seed < 0:
            raise UserError(f"seed must be 0 or more, got {self.seed} (--selection_seed)")

    def complete(self, epoch_steps: int, run_steps: int) -> None:
        """Note the steps of an epoch, n / B."""
        self._epoch_steps = epoch_steps

    def start(self, blocks: Sequence[BlockInfo]) -> None:
        """Begin a run over these blocks.

        Raises:
            UserError: K was left open.
        """
        super().start(blocks)
        self._round: list[int] = []
        self._last: int | None = None
        self.every = self._given
        if self.every is None:
            if self._epoch_steps is None:
                raise UserError("every is not given: set it to the steps for which a block is trained, 50 to 100")
            self.every = min(max(self._epoch_steps // len(blocks), SHORTEST), LONGEST)

    @property
    def blocks_per_step(self) -> int:
        """One."""
        return 1

    def remark(self, run_steps: int) -> str | None:
        """Whether some blocks are never trained."""
        assert self.every is not None, "start has set it"
        trained = -(-run_steps // self.every)
        if trained >= self.number_of_blocks:
            return None
        return (
            f"{run_steps} steps train {trained} of {self.number_of_blocks} blocks, {self.every} steps each "
            "(--select_every)"
        )

    def make_plan(self) -> Plan:
        """The block whose turn it is, which starts anew at its first step."""
        assert self.every is not None, "start has set it"
        turn, step_of_turn = divmod(self.step, self.every)
        place = turn % self.number_of_blocks
        if place == 0 and step_of_turn == 0:
            self._round = self._next_round()
        block = self._round[place]
        begins = step_of_turn == 0 or block != self._last  # a resumed run may have turns of another length
        self._last = block
        return Plan.of([block], fresh=[block] if begins else [])

    def _next_round(self) -> list[int]:
        if self.order == "random":
            return [int(block) for block in self._generator.permutation(self.number_of_blocks)]
        ascending = list(range(self.number_of_blocks))
        return ascending if self.order == "ascending" else ascending[::-1]

    def state_dict(self) -> dict[str, Any]:
        """All that the next choice depends on, as plain Python values."""
        return super().state_dict() | {"round": list(self._round), "last": self._last, "every": self.every}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state_dict()`."""
        super().load_state_dict(state)
        self._round, self._last = list(state["round"]), state["last"]
        if self._given is None:  # a resumed run may have epochs of other lengths, and its round goes on
            self.every = state["every"]
