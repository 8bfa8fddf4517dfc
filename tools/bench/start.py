"""How long a run takes from its command to its first optimizer step: `launch/train.py` against a plain TRL script.

python tools/bench_start.py --ranks 2 --rounds 5 --output runs/start

Both get the same rows, model, settings and DeepSpeed file, and are launched in turns: a round is `plain_trl.py`, which
does full fine-tuning, and `launch/train.py` with each of `--methods`. The step is over when its loss is printed, which
both do at once. CPU seconds are of all processes of a launch until then. The first round fills caches and is not
counted. `<output>/start.jsonl` receives a line per launch. The model is tiny: the arithmetic is not what is measured.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil
import torch

from agsel.errors import AgselError, RunError, UserError, one_line
from agsel.policies import METHODS
from tools import arithmetic
from tools.bench.command import REPOSITORY, environment, free_port

RESULTS = "start.jsonl"
PLAIN = "plain"
FIRST_STEP = re.compile(r"'loss': '|^step +1/")
"""What the Trainer prints of a step, and what agsel does in its place."""
ROWS = 512
LAST_LINES = 20
PACKAGES = ("torch", "deepspeed", "transformers", "trl")


@dataclass(frozen=True)
class Start:
    """A launch until the end of its first optimizer step.

    Attributes:
        seconds: on the clock.
        cpu_seconds: user and system time of all its processes.
    """

    seconds: float
    cpu_seconds: float


def main(arguments: Sequence[str]) -> None:
    """Measure what the command line asks for, and print the medians."""
    options = _parser().parse_args(arguments)
    try:
        for name in ("ranks", "rounds"):
            if getattr(options, name) < 1:
                raise UserError(f"{name} must be at least 1, got {getattr(options, name)} (--{name})")
        options.output.mkdir(parents=True, exist_ok=True)
        typed = shlex.join(["python", "tools/bench_start.py", *arguments])
        rows = measure(options.ranks, options.rounds, options.methods, origin(options.ranks, typed), options.output)
    except (AgselError, OSError) as error:
        sys.exit(f"agsel: error: {one_line(error)}")
    print(table(rows))


def measure(
    ranks: int, rounds: int, methods: Sequence[str], about: dict[str, Any], output: Path
) -> list[dict[str, Any]]:
    """Launch everything in turns. Returns the rows, which are written as they come.

    Raises:
        RunError: a launch fails.
    """
    rows = []
    port = free_port()
    with tempfile.TemporaryDirectory() as temporary, (output / RESULTS).open("a") as results:
        folder = Path(temporary)
        write_inputs(folder)
        for number in range(rounds + 1):
            for side in (PLAIN, *methods):
                start = launch(command(side, folder, ranks, port))
                shutil.rmtree(folder / "run")
                print(f"round {number}  {side}: {start.seconds:.2f} s, CPU {start.cpu_seconds:.2f} s", flush=True)
                if number > 0:
                    row = {"side": side, "seconds": start.seconds, "cpu_seconds": start.cpu_seconds, **about}
                    results.write(json.dumps(row) + "\n")
                    results.flush()
                    rows.append(row)
    for buffer in Path("/dev/shm").glob(f"deepspeed_allreduce_buffer_*_{port}_*"):  # left behind by DeepSpeed
        buffer.unlink()
    return rows


def write_inputs(folder: Path) -> None:
    """The tiny model of the demo, `model`, and rows with a prompt and a completion, `rows.jsonl`."""
    arithmetic.write_model(folder / "model", seed=0)
    problems, _ = arithmetic.draw_split(2, ROWS, 0, seed=0)
    stories = [problem.as_story() for problem in problems]
    rows = [{"prompt": story["question"], "completion": f" {story['answer']}"} for story in stories]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def command(side: str, folder: Path, ranks: int, port: int) -> list[str]:
    """What a user types, for the plain script or for a method of agsel."""
    script = "tools/bench/plain_trl.py" if side == PLAIN else "launch/train.py"
    values = {
        "model_name_or_path": folder / "model",
        "dataset_name": folder / "rows.jsonl",
        "output_dir": folder / "run",
        "deepspeed": REPOSITORY / "ds_configs" / "zero2.json",
        "use_cpu": not torch.cuda.is_available(),
        "dtype": "float32",
        "bf16": False,
        "gradient_checkpointing": False,
        "per_device_train_batch_size": 4,
        "max_steps": 1,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "tensorboard",
    } | ({} if side == PLAIN else {"method": side})
    words = [text for name, value in values.items() for text in (f"--{name}", str(value))]
    return ["deepspeed", "--num_gpus", str(ranks), "--master_port", str(port), str(REPOSITORY / script), *words]


def launch(words: Sequence[str]) -> Start:
    """Run a command to its end, which is not measured: ranks of the plain script sometimes abort as Python exits.

    Raises:
        RunError: it prints no first step.
    """
    began, start, said = time.perf_counter(), None, []
    with subprocess.Popen(
        words, env=environment(), cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            said.append(line)
            if start is None and FIRST_STEP.search(line):
                start = Start(time.perf_counter() - began, cpu_seconds(psutil.Process(process.pid)))
    if start is None:
        sys.stderr.writelines(said[-LAST_LINES:])
        raise RunError(f"no first step, exit code {process.returncode}: {shlex.join(words)}")
    return start


def cpu_seconds(process: psutil.Process) -> float:
    """User and system time of a process and all it has started, those that have ended included."""
    total = 0.0
    for one in [process, *process.children(recursive=True)]:
        with suppress(psutil.NoSuchProcess):
            times = one.cpu_times()
            total += times.user + times.system + times.children_user + times.children_system
    return total


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Medians of each side, and as multiples of the plain script's, in Markdown."""
    sides = dict.fromkeys(row["side"] for row in rows)
    medians = {side: [_median(rows, side, name) for name in ("seconds", "cpu_seconds")] for side in sides}
    lines = ["| | launches | seconds | ratio | CPU seconds | ratio |", "|---|---:|---:|---:|---:|---:|"]
    for side, (seconds, cpu) in medians.items():
        count = sum(row["side"] == side for row in rows)
        ratios = [mine / plain for mine, plain in zip((seconds, cpu), medians[PLAIN], strict=True)]
        lines.append(f"| {side} | {count} | {seconds:.2f} | {ratios[0]:.3f} | {cpu:.2f} | {ratios[1]:.3f} |")
    return "\n".join(lines)


def origin(ranks: int, typed: str) -> dict[str, Any]:
    """Where and when a row is measured."""
    return {
        "ranks": ranks,
        "cpu": _cpu(),
        "cpus": os.cpu_count(),
        "versions": ", ".join(f"{package} {version(package)}" for package in PACKAGES),
        "date": str(date.today()),
        "command": typed,
    }


def _median(rows: Sequence[dict[str, Any]], side: str, name: str) -> float:
    return statistics.median(row[name] for row in rows if row["side"] == side)


def _cpu() -> str:
    with suppress(OSError):
        found = re.search(r"^model name\s*: (.*)", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
        if found:
            return found[1]
    return platform.machine()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        usage=argparse.SUPPRESS,
        prog="bench_start.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--ranks", type=int, default=2, help="processes")
    parser.add_argument("--rounds", type=int, default=5, help="launches of each that are counted")
    parser.add_argument(
        "--methods", nargs="+", default=["full", "adagradselect"], choices=list(METHODS), help="of launch/train.py"
    )
    parser.add_argument("--output", type=Path, default=Path("runs/start"), help="folder for the rows; lines are added")
    return parser


if __name__ == "__main__":
    main(sys.argv[1:])
