"""`launch/train.py` that says what every rank is doing, and lingers in one phase, so that it can be hit there.

    deepspeed --num_gpus 2 tests/announcing_train.py 'step 3' 2 --setting value ...

prints `PHASE <rank> <pid> <phase>` for `loading`, and each `step <number>`, `evaluation` and `saving`. In the phase
named first it stays, the first time, for as many seconds as the number says.
"""

from __future__ import annotations

import os
import sys
import time
from typing import Any

import torch.distributed as dist

from agsel import train


class AnnouncingTrainer(train.RowTrainer):
    linger_in = ""
    seconds = 0.0

    def __init__(self, *arguments: Any, **options: Any) -> None:
        self.announce("loading")
        super().__init__(*arguments, **options)

    def training_step(self, *arguments: Any, **options: Any) -> Any:
        self.announce(f"step {self.state.global_step + 1}")
        return super().training_step(*arguments, **options)

    def prediction_step(self, *arguments: Any, **options: Any) -> Any:
        self.announce("evaluation")
        return super().prediction_step(*arguments, **options)

    def _write_checkpoint(self, *arguments: Any, **options: Any) -> None:
        super()._write_checkpoint(*arguments, **options)
        self.announce("saving")

    def announce(self, phase: str) -> None:
        print(f"PHASE {dist.get_rank()} {os.getpid()} {phase}\n", end="", flush=True)
        if phase == self.linger_in:
            time.sleep(self.seconds)
            type(self).linger_in = ""


if __name__ == "__main__":
    phase, seconds, *arguments = [argument for argument in sys.argv[1:] if not argument.startswith("--local_rank")]
    AnnouncingTrainer.linger_in, AnnouncingTrainer.seconds = phase, float(seconds)
    train.RowTrainer = AnnouncingTrainer
    train.main(arguments)
    dist.destroy_process_group()
