"""Save a checkpoint again and again, each time killed one operation on the run folder later.

    python tests/killed_save_worker.py FOLDER

Every attempt starts from checkpoints of steps 2 and 4, saves step 4 again, then step 6, and keeps only that. It leaves
`FOLDER/killed-N`, where N counts the operations begun; the first attempt that is not killed ends the series.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch.distributed as dist

from agsel.runs import checkpoints


def save(run: Path, step: int, text: str) -> None:
    with checkpoints.saving(run, step, {}, None) as staged:
        (staged / "weights").write_text(text)
        (staged / "part").mkdir()
        (staged / "part" / "states").write_text(text)


def die_at(operation: int, run: Path) -> None:
    """Be killed just before this operation on files of the run folder."""
    seen = 0

    def on_event(_: str, arguments: tuple[Any, ...]) -> None:
        nonlocal seen
        if any(str(run) in str(argument) for argument in arguments):
            seen += 1
            if seen == operation:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(on_event)


def attempt(run: Path, operation: int) -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    save(run, 2, "old")
    save(run, 4, "old")
    die_at(operation, run)
    save(run, 4, "new")
    save(run, 6, "new")
    checkpoints.rotate(run, 1)
    os._exit(0)


def is_killed(run: Path, operation: int) -> bool:
    """In a process of its own."""
    child = os.fork()
    if child == 0:
        attempt(run, operation)
    _, status = os.waitpid(child, 0)
    assert status in (0, signal.SIGKILL), status
    return status == signal.SIGKILL


if __name__ == "__main__":
    folder, operation = Path(sys.argv[1]), 1
    while is_killed(folder / f"killed-{operation:03}", operation):
        operation += 1
