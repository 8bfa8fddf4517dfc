"""Speed and memory of training methods side by side on the same model, kernels and DeepSpeed.

python tools/bench.py --models qwen2.5-0.5b --stages 2 --methods full bound exploit explore --ranks 2 \
    --shapes 8x512 --liger all --output runs/bench

Every option that takes several values multiplies the configurations. `--plan FILE` takes a YAML list of such option
sets, to which the command line adds what they leave out, as with `--plan tools/bench.yaml --ranks 1`. One launch
measures them all, one after another; `<output>/rows.jsonl` receives a line as soon as a configuration is done,
`table.md` and `bench.png` are made from it at the end, or again with `--table_only`.
With several `--ranks` there is one launch for each number; `tools/bench_scaling.py` compares them.
Models have random weights: speed and memory do not depend on them. Without a GPU it runs on the CPU (`--models tiny`).
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import socket
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from agsel.errors import AgselError, UserError, one_line
from agsel.planning.shapes import model_config
from tools.bench.compared_methods import METHODS
from tools.bench.configurations import LIGER, Configuration
from tools.bench.picture import draw
from tools.bench.plans import OPTIONS, expand, read_plan
from tools.bench.rows import measured_rows
from tools.bench.table import table

REPOSITORY = Path(__file__).resolve().parents[2]


def main(arguments: Sequence[str]) -> None:
    """Measure what the command line asks for, then write table and picture."""
    untyped = argparse.Namespace(**dict.fromkeys(OPTIONS))
    options = _parser().parse_args(arguments, untyped)
    folder = Path(options.output)
    try:
        code = 0 if options.table_only else launch(options, shlex.join(["python", "tools/bench.py", *arguments]))
        if code != 0 and not (folder / "rows.jsonl").exists():
            sys.exit(code)  # the ranks have said why
        rows = measured_rows(folder)
    except (AgselError, OSError) as error:
        sys.exit(f"agsel: error: {one_line(error)}")
    text = table(rows, options.peak_tflops)
    (folder / "table.md").write_text(text + "\n")
    print(text)
    draw(rows, folder / "bench.png")
    sys.exit(code)


def launch(options: argparse.Namespace, typed: str) -> int:
    """Measure all configurations, one launch for each number of ranks. Returns the first exit code that is not 0.

    Args:
        options: of the command line.
        typed: the command line, for the rows.
    """
    configurations = expand(option_sets(options))
    for name, least in (("rounds", 1), ("steps", 1), ("warmup", 0)):
        value = getattr(options, name)
        if value < least:
            raise UserError(f"{name} must be at least {least}, got {value} (--{name})")
    for name in {configuration.model for configuration in configurations}:
        model_config(name, "--models")
    Path(options.output).mkdir(parents=True, exist_ok=True)
    counts = dict.fromkeys(configuration.ranks for configuration in configurations)
    alike = [[one for one in configurations if one.ranks == ranks] for ranks in counts]
    codes = [launch_ranks(options, typed, members * options.rounds) for members in alike]
    return next(filter(None, codes), 0)


def option_sets(options: argparse.Namespace) -> list[dict[str, Any]]:
    """That of the command line, or those of the plan with what was typed beside it.

    Raises:
        UserError: there is no such plan, or it has what was typed, too.
    """
    typed = {name: value for name in OPTIONS if (value := getattr(options, name)) is not None}
    if options.plan is None:
        usual = _parser()
        return [{name: usual.get_default(name) for name in OPTIONS} | typed]
    sets = read_plan(options.plan)
    if twice := [name for name in typed if any(name in one for one in sets)]:
        raise UserError(f"{options.plan} (--plan) has {twice[0]}: leave out --{twice[0]}, or change the plan")
    return [{**one, **typed} for one in sets]


def launch_ranks(options: argparse.Namespace, typed: str, configurations: Sequence[Configuration]) -> int:
    """Measure configurations of one number of ranks in one run of `measured_ranks`. Returns its exit code."""
    folder = Path(options.output)
    plan = {
        "configurations": [asdict(configuration) for configuration in configurations],
        "steps": options.steps,
        "warmup": options.warmup,
        "profile": options.profile,
        "command": typed,
    }
    (folder / "plan.json").write_text(json.dumps(plan, indent=1))
    return run_ranks("tools.bench.measured_ranks", configurations[0].ranks, folder)


def run_ranks(module: str, ranks: int, folder: Path) -> int:
    """Run a module of the benchmark on so many ranks, over the folder of its plan. Returns the exit code."""
    command = ["deepspeed", "--num_gpus", str(ranks), "--master_port", str(free_port())]
    command += ["--module", module, str(folder.resolve())]
    return subprocess.run(command, env=environment()).returncode


def environment() -> dict[str, str]:
    """That of the ranks. Where the command was typed, paths mean what they meant there, but `tools` is this one."""
    path = os.pathsep.join([str(REPOSITORY), *filter(None, [os.environ.get("PYTHONPATH")])])
    on_cpu = {} if torch.cuda.is_available() else {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    return os.environ | {"PYTHONPATH": path, "PYTHONSAFEPATH": "1"} | on_cpu


def free_port() -> int:
    """A port that nobody uses now."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        usage=argparse.SUPPRESS,
        prog="bench.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _add_measured(parser)
    parser.add_argument("--plan", type=Path, help="YAML list of sets of the options above")
    parser.add_argument("--rounds", type=int, default=1, help="times to measure everything; the table shows the median")
    parser.add_argument("--steps", type=int, default=20, help="measured steps")
    parser.add_argument("--warmup", type=int, default=5, help="steps before them; more, if layers compile")
    parser.add_argument("--profile", action="store_true", help="also profile three steps of rank 0's main thread")
    parser.add_argument("--output", default="runs/bench", help="folder for rows, table and picture; rows are added")
    parser.add_argument("--table_only", action="store_true", help="make table and picture again, measure nothing")
    parser.add_argument("--peak_tflops", type=float, default=989, help="of one GPU, for the MFU; H100 and H200: 989")
    return parser


def _add_measured(parser: argparse.ArgumentParser) -> None:
    """The options of which a plan has sets."""
    several: dict[str, Any] = {"nargs": "+"}
    switch: dict[str, Any] = {"nargs": "+", "choices": ("on", "off")}
    methods, kernels = ", ".join(METHODS), list(LIGER)
    parser.add_argument("--models", default=["qwen2.5-0.5b"], help="built-in shape, folder or hub name", **several)
    parser.add_argument("--stages", default=[2], type=int, help="ZeRO stages", **several)
    parser.add_argument("--methods", default=["full", "bound", "exploit", "explore"], help=methods, **several)
    parser.add_argument("--ranks", default=[2], type=int, help="processes, one a GPU", **several)
    parser.add_argument("--fractions", default=[0.3], type=float, help="shares of the layers", **several)
    parser.add_argument("--densities", default=[0.01], type=float, help="shares of the weights", **several)
    parser.add_argument("--select_from", default=[0], type=float, help="lowest layer that agsel selects", **several)
    parser.add_argument("--shapes", default=["8x512"], help="rows x tokens of a micro-batch per GPU", **several)
    parser.add_argument(
        "--liger",
        default=["none"],
        choices=kernels,
        help="its fused loss, all kernels, or those with TRL's loss",
        **several,
    )
    parser.add_argument("--checkpointing", default=["off"], help="gradient checkpointing", **switch)
    parser.add_argument("--compile", default=["off"], help="compile every decoder layer", **switch)
    parser.add_argument("--offload_states", default=["on"], help="agsel's own offloading", **switch)
    parser.add_argument("--accumulation", default=[1], type=int, help="gradient accumulation steps", **several)
