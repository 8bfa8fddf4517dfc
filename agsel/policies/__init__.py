"""Selection policies: which blocks the next optimizer step updates. One file per method, and one line here."""

from agsel.policies.adagradselect import AdaGradSelect
from agsel.policies.full import FullFineTuning
from agsel.policies.policy import (
    BlockInfo,
    FractionPolicy,
    Plan,
    Policy,
    Probe,
    StepKind,
    Update,
    blocks_of_fraction,
    flags_of,
    fraction_of_blocks,
    reads_fraction,
    setting,
)
from agsel.policies.random_blocks import RandomBlocks
from agsel.policies.topk import TopK

METHODS: dict[str, type[Policy]] = {
    policy.method: policy
    for policy in (
        AdaGradSelect,
        TopK,
        RandomBlocks,
        FullFineTuning,
    )
}
"""By name on the command line."""

__all__ = [
    "METHODS",
    "AdaGradSelect",
    "BlockInfo",
    "FractionPolicy",
    "FullFineTuning",
    "Plan",
    "Policy",
    "Probe",
    "RandomBlocks",
    "StepKind",
    "TopK",
    "Update",
    "blocks_of_fraction",
    "flags_of",
    "fraction_of_blocks",
    "reads_fraction",
    "setting",
]
