"""For scripts that run on the ranks of a test: run named cases, save what each returned, one file per rank."""

from __future__ import annotations

import argparse
import gc
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator

from tests.distributed import RANKS, launch_worker


def run_cases(cases: dict[str, Callable[[], Any]]) -> None:
    """Entry point of a rank script: run the cases named on the command line (all by default) and save the results."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--cases", nargs="*", default=list(cases))
    parser.add_argument("--local_rank", type=int)
    arguments = parser.parse_args()
    on_gpu = get_accelerator().device_name() == "cuda"
    if on_gpu:
        torch.use_deterministic_algorithms(True)
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    deepspeed.init_distributed(dist_backend="nccl" if on_gpu else "gloo")
    results = {}
    gc.freeze()  # what was imported is not searched again after every case
    for name in arguments.cases:
        start = time.perf_counter()
        results[name] = cases[name]()
        if torch.distributed.get_rank() == 0:
            print(f"case {name}: {time.perf_counter() - start:.1f} s", flush=True)
        gc.collect()
        torch.distributed.barrier()
    torch.save(results, arguments.output / f"rank{torch.distributed.get_rank()}.pt")


def launch_cases(script: str | Path, output: Path, *cases: str, ranks: int = RANKS) -> list[dict[str, Any]]:
    """Launch a rank script and return the results of its cases, one dictionary per rank."""
    output.mkdir(parents=True, exist_ok=True)
    arguments = ["--cases", *cases] if cases else []
    launch_worker(script, "--output", output, *arguments, ranks=ranks)
    return [torch.load(output / f"rank{rank}.pt", map_location="cpu", weights_only=False) for rank in range(ranks)]


def message_of(error: type[Exception], action: Callable[[], Any]) -> str | None:
    """The message of the error that `action` raises, None if it raises none."""
    try:
        action()
    except error as raised:
        return str(raised)
    return None
