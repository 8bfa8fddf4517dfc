"""Selection policies: which blocks the next optimizer step updates. One file per method, and one line here."""

from agsel.policies.adagradselect import AdaGradSelect
from agsel.policies.badam import BAdam
from agsel.policies.freezeout import FreezeOut
from agsel.policies.full import FullFineTuning
from agsel.policies.grass import Grass
from agsel.policies.ist import Ist
from agsel.policies.lisa import Lisa
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
        Lisa,
        BAdam,
        Grass,
        Ist,
        FreezeOut,
        FullFineTuning,
    )
}
"""By name on the command line."""

__all__ = [
    "METHODS",
    "AdaGradSelect",
    "BAdam",
    "BlockInfo",
    "FractionPolicy",
    "FreezeOut",
    "FullFineTuning",
    "Grass",
    "Ist",
    "Lisa",
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
