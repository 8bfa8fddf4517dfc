"""Selection policies: which blocks the next optimizer step updates. One file per method."""

from agsel.policies.adagradselect import AdaGradSelect
from agsel.policies.full import FullFineTuning
from agsel.policies.policy import Plan, Policy, blocks_of_fraction, fraction_of_blocks
from agsel.policies.random_blocks import RandomBlocks
from agsel.policies.topk import TopK

__all__ = [
    "AdaGradSelect",
    "FullFineTuning",
    "Plan",
    "Policy",
    "RandomBlocks",
    "TopK",
    "blocks_of_fraction",
    "fraction_of_blocks",
]
