"""What runs on the ranks of tools/bench.py: every configuration of a plan, one after another, in one process.

deepspeed --num_gpus 2 --module tools.bench.measured_ranks FOLDER

FOLDER/plan.json says what to measure; FOLDER/rows.jsonl receives one line per configuration.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
from dataclasses import asdict
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch._dynamo.utils import counters
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from agsel.runs.ranks import ends_in_one_line, join_ranks
from agsel.zero.communication import start_deepspeed
from tools.bench.bare_loop import run_engine
from tools.bench.compared_methods import method_of
from tools.bench.configurations import Configuration
from tools.bench.device import host_link_bandwidth, on_cuda
from tools.bench.random_model import restored_modules
from tools.bench.stopwatch import Measurement, Settings
from tools.bench.whole_run import run_trainer

PACKAGES = ("torch", "deepspeed", "transformers", "peft")
SUMMED = ("pinned_bytes",)
"""What ranks of one host add up; of everything else the row holds the largest."""


def main() -> None:
    """Measure every configuration of the plan; one that fails becomes a row that says why."""
    folder = joined_folder(__doc__)
    measure(json.loads((folder / "plan.json").read_text()), folder)
    dist.destroy_process_group()


def joined_folder(description: str | None) -> Path:
    """Join the ranks of the launch, on this rank's device. Returns the folder that the command line names."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--local_rank", type=int)
    folder: Path = parser.parse_args().folder
    with ends_in_one_line():
        join_ranks()
        if on_cuda():
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        start_deepspeed()
    return folder


def measure(plan: dict[str, Any], folder: Path) -> None:
    """Measure every configuration of the plan, and add its row to those of the folder."""
    source = origin(plan["command"])
    settings = Settings(plan["steps"], plan["warmup"], plan["profile"], folder)
    for number, fields in enumerate(plan["configurations"], start=1):
        configuration = Configuration(**fields)
        outcomes: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(outcomes, attempt(configuration, settings))
        if dist.get_rank() == 0:
            row = asdict(configuration) | source | merge(outcomes, configuration)
            with (folder / "rows.jsonl").open("a") as rows:
                rows.write(json.dumps(row) + "\n")
            report(f"{number}/{len(plan['configurations'])}", configuration, row)


def report(number: str, configuration: Configuration, row: dict[str, Any]) -> None:
    """Print a row as it comes."""
    result = row["error"] or f"{row['ms_per_step']:.1f} ms/step, peak {row['peak_bytes'] / 1e9:.2f} GB"
    print(f"bench: {number} {configuration.setting}, {configuration.label}: {result}", flush=True)


def attempt(configuration: Configuration, settings: Settings) -> Measurement | str:
    """The measurement, or one line about the error that prevented it. Frees everything in between."""
    try:
        run = run_trainer if method_of(configuration).start is None else run_engine
        with restored_modules(configuration):
            return run(configuration, settings)
    except (Exception, SystemExit) as error:
        return " ".join(f"{type(error).__name__}: {error}".split())[:300]
    finally:
        free()


def free() -> None:
    """Give back what the last configuration held, so that the next one starts like the first."""
    unset_hf_deepspeed_config()
    torch._dynamo.reset()
    counters.clear()
    gc.collect()
    if on_cuda():
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch._C._host_emptyCache()


def merge(outcomes: list[Measurement | str], configuration: Configuration) -> dict[str, Any]:
    """The part of a row that was measured: the slowest and fullest rank's, or the first error."""
    errors = [outcome for outcome in outcomes if isinstance(outcome, str)]
    if errors:
        return {"error": errors[0]}
    ranks = [asdict(outcome) for outcome in outcomes if isinstance(outcome, Measurement)]
    row: dict[str, Any] = {"error": None}
    for name, value in ranks[0].items():
        of_ranks = [rank[name] for rank in ranks]
        row[name] = None if value is None else sum(of_ranks) if name in SUMMED else max(of_ranks)
    return row | {"tokens_per_second": 1000 * configuration.tokens_per_step / row["ms_per_step"]}


def origin(command: str) -> dict[str, Any]:
    """Where and when a row was measured, and how fast the slowest rank's link to host memory was."""
    to_device, to_host = host_link_bandwidth()
    return {
        "to_device_bytes_per_second": to_device,
        "to_host_bytes_per_second": to_host,
        "device": f"{dist.get_world_size()} x {torch.cuda.get_device_name() if on_cuda() else 'CPU'}",
        "versions": ", ".join(f"{package} {version(package)}" for package in PACKAGES),
        "date": str(date.today()),
        "command": command,
    }


if __name__ == "__main__":
    main()
