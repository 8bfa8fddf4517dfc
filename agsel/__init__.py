"""agsel: AdaGradSelect fine-tuning on DeepSpeed ZeRO. Three lines turn a DeepSpeed script into block selection.

optimizer = torch.optim.AdamW(agsel.block_param_groups(model), lr=1e-4)
engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=ds_config)
selection = agsel.attach(engine, agsel.AdaGradSelect(fraction=0.3, explore_steps=500, seed=0))
"""

import agsel.prerequisites  # noqa: F401  # before what it looks for

from agsel.blocks import Block, block_param_groups, find_blocks
from agsel.compilation import compile_layers
from agsel.elements import ElementMask, choose_elements, load_elements, use_elements
from agsel.errors import AgselError, UserError
from agsel.policies import (
    AdaGradSelect,
    BAdam,
    BlockInfo,
    FractionPolicy,
    FreezeOut,
    FullFineTuning,
    Grass,
    Ist,
    Lisa,
    Plan,
    Policy,
    Probe,
    RandomBlocks,
    TopK,
    Update,
    setting,
)
from agsel.zero import RanksDisagreeError, Selection, StepReport, attach, lean_initialization

__version__ = "0.1.0"

__all__ = [
    "AdaGradSelect",
    "AgselError",
    "BAdam",
    "Block",
    "BlockInfo",
    "ElementMask",
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
    "RanksDisagreeError",
    "Selection",
    "StepReport",
    "TopK",
    "Update",
    "UserError",
    "attach",
    "block_param_groups",
    "choose_elements",
    "compile_layers",
    "find_blocks",
    "lean_initialization",
    "load_elements",
    "setting",
    "use_elements",
]
