"""LISA (arXiv 2403.17919): embedding, final norm and head at every step, and a few layers, drawn for a while."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from agsel.policies.policy import Plan, blocks_of_fraction, setting
from agsel.policies.random_blocks import RandomBlocks


@dataclass(kw_only=True)
class Lisa(RandomBlocks):
    """Update all blocks that are no layer, and gamma of the layers, drawn uniformly anew every K steps (Algorithm 1).

    As in its authors' code, which switches layers only. The optimizer states of what is always updated never leave the
    device. Over adapters, which only layers have, it is `RandomBlocks`.

    Attributes:
        fraction: gamma, as a share of the layers.
        every: K.
    """

    method = "lisa"
    rule = "embedding, final norm and head always, and layers drawn uniformly"
    takes_part = "all"
    spread_by = "lower --select_every, or raise --select_fraction"

    every: int = setting(20, flag="select_every", help="Steps for which a set of blocks is kept.")

    @property
    def pinned(self) -> frozenset[int]:
        """All blocks that are no layer."""
        return frozenset(range(self.number_of_blocks)) - {*self.drawn_from}

    @property
    def drawn_from(self) -> Sequence[int]:
        """The layers."""
        return [index for index, block in enumerate(self.blocks) if block.is_layer]

    @property
    def blocks_per_step(self) -> int:
        """Those that are always updated, and gamma of the layers."""
        return len(self.pinned) + blocks_of_fraction(self.fraction, len(self.drawn_from))

    def make_plan(self) -> Plan:
        """What is always updated, and the current layers."""
        return Plan.of(self.pinned | super().make_plan().trainable)
