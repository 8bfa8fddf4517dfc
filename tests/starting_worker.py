"""Starts of runs at the same moment, forked off one process that has imported everything.

    python tests/starting_worker.py STARTS.json

STARTS.json maps a name to the environment of the start and its command line. A command line that is null joins its
group, and no more. What a start prints goes to NAME.log beside the file. Prints `began NAME PID` and `ended NAME CODE`.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
import threading
from collections.abc import Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from agsel import train
from agsel.runs.preemption import host_group
from agsel.runs.ranks import join_ranks
from agsel.zero.communication import start_deepspeed

FORK = multiprocessing.get_context("fork")


def start(log: Path, environment: dict[str, str], arguments: Sequence[str] | None, gate: Any) -> None:
    with log.open("w") as output:
        for stream in (1, 2):
            os.dup2(output.fileno(), stream)
    os.environ.update(environment)
    gate.wait()
    if arguments is None:
        join()
    else:
        train.main(arguments)


def join() -> None:
    join_ranks()
    start_deepspeed()
    dist.all_reduce(torch.ones(1), group=host_group())
    shared = [*Path("/dev/shm").glob(f"deepspeed_*_{os.environ['MASTER_PORT']}_*")]
    print(f"joined {dist.get_rank()} of {dist.get_world_size()}, sharing {shared}")


def say(text: str) -> None:
    print(f"{text}\n", end="", flush=True)


def follow(name: str, process: BaseProcess) -> None:
    process.join()
    say(f"ended {name} {process.exitcode}")


if __name__ == "__main__":
    file = Path(sys.argv[1])
    starts = json.loads(file.read_text())
    gate = FORK.Barrier(len(starts))
    processes = {
        name: FORK.Process(target=start, args=(file.with_name(f"{name}.log"), environment, arguments, gate))
        for name, (environment, arguments) in starts.items()
    }
    for process in processes.values():
        process.start()
    for name, process in processes.items():
        say(f"began {name} {process.pid}")
        threading.Thread(target=follow, args=(name, process)).start()
