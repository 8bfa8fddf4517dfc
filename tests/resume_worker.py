"""Train with `launch/train.py` to the end, then again from some of its checkpoints, one resume after the other.

    python tests/start_ranks.py 2 PORT tests/resume_worker.py FOLDER STEP,STEP,... --setting value ...

FOLDER/model and FOLDER/rows.jsonl are trained into FOLDER/whole, which keeps a checkpoint of every step. Then
FOLDER/after-STEP goes on from that step of the run before it, in this order.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from deepspeed.accelerator import get_accelerator

from agsel import train
from tests.tiny_run import settings


def run(folder: Path, name: str, arguments: list[str]) -> Path:
    train.main(settings(folder / "model", folder / "rows.jsonl", folder / name, select_fraction=None) + arguments)
    return folder / name


if __name__ == "__main__":
    folder, steps, *arguments = sys.argv[1:]
    if get_accelerator().device_name() == "cuda":
        torch.use_deterministic_algorithms(True)
    before = run(Path(folder), "whole", arguments)
    for step in steps.split(","):
        checkpoint = ["--resume_from_checkpoint", str(before / f"checkpoint-{step}")]
        before = run(Path(folder), f"after-{step}", arguments + checkpoint)
