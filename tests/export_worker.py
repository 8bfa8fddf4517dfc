"""Train with `launch/train.py` and save the logits of the model in memory, to be compared with the exported one.

    python tests/start_ranks.py 2 PORT tests/export_worker.py FOLDER --setting value ...

trains FOLDER/tied and FOLDER/untied into FOLDER/run-tied and FOLDER/run-untied, and writes `logits.pt` into those.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist

from agsel import train
from tests.tiny import tiny_batch
from tests.tiny_run import settings


def export(folder: Path, name: str, arguments: list[str]) -> None:
    run = folder / f"run-{name}"
    trainer = train.main(settings(folder / name, folder / "rows.jsonl", run) + arguments)
    trainer.deepspeed.eval()
    with torch.no_grad():
        logits = trainer.deepspeed.module(tiny_batch(0, 0, 0)).logits  # on all ranks: ZeRO-3 gathers the weights
    if dist.get_rank() == 0:
        torch.save(logits, run / "logits.pt")


if __name__ == "__main__":
    folder, *arguments = sys.argv[1:]
    for name in ("tied", "untied"):
        export(Path(folder), name, arguments)
