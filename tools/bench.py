"""Speed and memory of training methods side by side on the same model, kernels and DeepSpeed.

python tools/bench.py --models qwen2.5-0.5b --stages 2 --methods full bound exploit explore --ranks 2 \
    --shapes 8x512 --liger all --output runs/bench

Every option that takes several values multiplies the configurations; `--plan FILE` takes a YAML list of such option
sets instead. One launch measures them all, one after another; `<output>/rows.jsonl` receives a line as soon as a
configuration is done, `table.md` and `bench.png` are made from it at the end, or again with `--table_only`.
With several `--ranks` there is one launch for each number; `tools/bench_scaling.py` compares them.
Models have random weights: speed and memory do not depend on them. Without a GPU it runs on the CPU (`--models tiny`).
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import re
import shlex
import socket
import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
import yaml

from agsel.errors import UserError

REPOSITORY = Path(__file__).resolve().parent.parent

METHODS = {
    "full": "full fine-tuning, stock DeepSpeed",
    "full-layers": "full fine-tuning, stock DeepSpeed told to gather whole layers, as agsel does at ZeRO-3",
    "bound": "the same number of layers trainable for ever, all else frozen, stock DeepSpeed",
    "fixed": "agsel, one set of layers for ever",
    "exploit": "agsel, a new random set of layers at every step",
    "explore": "agsel, the layers with the largest gradient norms, every step explores",
    "topk": "agsel's TopK policy",
    "lisa": "agsel, a new random set every 20 steps, as LISA",
    "trainer": "`exploit` through launch/train.py and TRL's own fused loss",
    "lora-256": "LoRA r=256 on all linear layers, stock DeepSpeed",
    "lora-16": "LoRA r=16 on all linear layers, stock DeepSpeed",
    "zero-offload": "full fine-tuning, ZeRO-Offload (CPU Adam)",
    "badam": "the BAdam package, as many layers at a time, no switch while measured",
}
LIGER = {"none": "", "loss": "Liger's loss", "all": "Liger"}
WITHOUT_FRACTION = ("full", "full-layers", "lora-256", "lora-16", "zero-offload")
MOVING_STATES = ("fixed", "exploit", "explore", "topk", "lisa", "trainer")

PHASES = {"forward_ms": "#4c72b0", "backward_ms": "#dd8452", "step_ms": "#55a868"}
COLUMNS = (
    *("method", "ms/step", "10-90 %", "forward", "backward", "step", "tokens/s/GPU", "MFU"),
    *("peak GB", "steady GB", "init GB", "moved GB", "exposed ms", "time / bound", "full / time", "peak / full"),
)


@dataclass(frozen=True, kw_only=True)
class Configuration:
    """What one row measures. A micro-batch is `micro_batch` rows of `sequence` tokens per GPU."""

    model: str
    stage: int
    method: str
    ranks: int = 2
    fraction: float = 0.3
    micro_batch: int = 8
    sequence: int = 512
    liger: str = "none"
    checkpointing: bool = False
    compile: bool = False
    offload_states: bool = True
    accumulation: int = 1

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise UserError(f"unknown method {self.method!r} (--methods): use some of {', '.join(METHODS)}")
        if self.stage not in (1, 2, 3):
            raise UserError(f"stage must be 1, 2 or 3, got {self.stage} (--stages)")
        if self.ranks < 1:
            raise UserError(f"ranks must be at least 1, got {self.ranks} (--ranks)")
        if self.liger not in LIGER:
            raise UserError(f"unknown value {self.liger!r} (--liger): use {', '.join(LIGER)}")
        if self.liger == "all" and self.compile:
            raise UserError("Liger's kernels inside the layers cannot be compiled: use --liger loss, or --compile off")

    @property
    def label(self) -> str:
        """Name of the row in its group."""
        fraction = "" if self.fraction == Configuration.fraction else f" {self.fraction:.0%}"
        return f"{self.method}{fraction}{'' if self.offload_states else ', no offload'}"

    @property
    def setting(self) -> str:
        """All but the method: what rows must share to be compared."""
        switches = [LIGER[self.liger]] if LIGER[self.liger] else []
        switches += [name for name in ("checkpointing", "compile") if getattr(self, name)]
        accumulation = [f"accumulation {self.accumulation}"] if self.accumulation > 1 else []
        shape = f"{self.micro_batch} x {self.sequence}"
        ranks = f"{self.ranks} rank{'s' * (self.ranks > 1)}"
        return ", ".join([self.model, f"ZeRO-{self.stage}", shape, *accumulation, *switches, ranks])

    def canonical(self) -> Configuration:
        """The same configuration without the options its method does not read, so that it is measured once."""
        unread = {} if self.method not in WITHOUT_FRACTION else {"fraction": Configuration.fraction}
        unread |= {} if self.method in MOVING_STATES else {"offload_states": True}
        return replace(self, **unread)  # type: ignore[arg-type]


def main() -> None:
    """Measure what the command line asks for, then write table and picture."""
    arguments = _parser().parse_args()
    folder = Path(arguments.output)
    try:
        code = 0 if arguments.table_only else launch(arguments, folder)
        rows = measured_rows(folder)
    except (OSError, ValueError) as error:
        sys.exit(f"agsel: error: {' '.join(str(error).split())}")
    text = table(rows, arguments.peak_tflops)
    (folder / "table.md").write_text(text + "\n")
    print(text)
    draw(rows, folder / "bench.png")
    sys.exit(code)


def launch(arguments: argparse.Namespace, folder: Path) -> int:
    """Measure all configurations, one launch for each number of ranks. Returns the first exit code that is not 0."""
    configurations = expand(read_plan(arguments.plan) if arguments.plan else [options_of(arguments)])
    if arguments.rounds < 1:
        raise UserError(f"rounds must be at least 1, got {arguments.rounds} (--rounds)")
    folder.mkdir(parents=True, exist_ok=True)
    counts = dict.fromkeys(configuration.ranks for configuration in configurations)
    alike = [[one for one in configurations if one.ranks == ranks] for ranks in counts]
    codes = [launch_ranks(arguments, folder, members * arguments.rounds) for members in alike]
    return next(filter(None, codes), 0)


def read_plan(path: Path) -> list[dict[str, Any]]:
    """The option sets of a plan.

    Raises:
        UserError: no such file, or no list of option sets in it.
    """
    if not path.is_file():
        raise UserError(f"no such file: {path} (--plan); tools/bench.yaml is one")
    try:
        plan = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise UserError(f"{path} is no YAML (--plan): {error}") from error
    if not isinstance(plan, list) or not all(isinstance(options, dict) for options in plan):
        raise UserError(f"{path} is no list of option sets (--plan): write it as tools/bench.yaml")
    return plan


def launch_ranks(arguments: argparse.Namespace, folder: Path, configurations: Sequence[Configuration]) -> int:
    """Measure configurations of one number of ranks in one run of tools/bench_ranks.py. Returns its exit code."""
    plan = {
        "configurations": [asdict(configuration) for configuration in configurations],
        "steps": arguments.steps,
        "warmup": arguments.warmup,
        "profile": arguments.profile,
        "command": shlex.join(["python", "tools/bench.py", *sys.argv[1:]]),
    }
    (folder / "plan.json").write_text(json.dumps(plan, indent=1))
    command = ["deepspeed", "--num_gpus", str(configurations[0].ranks), "--master_port", str(_free_port())]
    command += ["tools/bench_ranks.py", str(folder.resolve())]
    on_cpu = {} if torch.cuda.is_available() else {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=REPOSITORY, env=os.environ | on_cpu).returncode


OPTIONS: dict[str, str] = {
    "models": "model",
    "stages": "stage",
    "methods": "method",
    "ranks": "ranks",
    "fractions": "fraction",
    "shapes": "shape",
    "liger": "liger",
    "checkpointing": "checkpointing",
    "compile": "compile",
    "offload_states": "offload_states",
    "accumulation": "accumulation",
}
"""Option of the command line and of a plan -> field of the configuration; a shape is two of them."""


def expand(option_sets: Iterable[dict[str, Any]]) -> list[Configuration]:
    """The configurations that option sets describe: the product of the values of each, without repetition.

    Raises:
        UserError: an unknown option or value.
    """
    configurations: dict[Configuration, None] = {}
    for options in option_sets:
        if unknown := options.keys() - OPTIONS.keys():
            raise UserError(f"unknown option {sorted(map(str, unknown))[0]!r} in the plan: use {', '.join(OPTIONS)}")
        if missing := [name for name in ("models", "stages", "methods") if name not in options]:
            raise UserError(f"an option set of the plan has no {missing[0]}: add it")
        values = [value if isinstance(value, list) else [value] for value in options.values()]
        for chosen in itertools.product(*values):
            named = dict(zip((OPTIONS[name] for name in options), chosen, strict=True))
            configurations[Configuration(**_fields_of(named)).canonical()] = None
    return list(configurations)


def _fields_of(named: dict[str, Any]) -> dict[str, Any]:
    """`shape` split in two, `on` and `off` as truth values."""
    if "shape" in named:
        shape = str(named.pop("shape"))
        if not re.fullmatch(r"[1-9]\d*x[1-9]\d*", shape):
            raise UserError(
                f"{shape!r} is no shape (--shapes): write rows x tokens of a micro-batch, for example 8x512"
            )
        rows, length = shape.split("x")
        named |= {"micro_batch": int(rows), "sequence": int(length)}
    return {name: {"on": True, "off": False}.get(value, value) for name, value in named.items()}


def options_of(arguments: argparse.Namespace) -> dict[str, Any]:
    """The option set of the command line."""
    return {name: getattr(arguments, name) for name in OPTIONS}


def measured_rows(folder: Path) -> list[dict[str, Any]]:
    """`read_rows` of the folder of a run.

    Raises:
        UserError: nothing has been measured there.
    """
    path = folder / "rows.jsonl"
    if not path.is_file():
        raise UserError(f"{folder} has no rows.jsonl: measure first, tools/bench.py --output {folder}")
    return read_rows(path)


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows measured so far; of several of the same configuration the one with the median time."""
    measured: dict[Configuration, list[dict[str, Any]]] = {}
    for row in (json.loads(line) for line in path.read_text().splitlines()):
        measured.setdefault(configuration_of(row), []).append(row)
    return [median_row(rows) for rows in measured.values()]


def median_row(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The row with the median time per step, the faster of two; one that failed only if all did."""
    succeeded = sorted((row for row in rows if not row["error"]), key=lambda row: row["ms_per_step"])
    return succeeded[(len(succeeded) - 1) // 2] if succeeded else rows[-1]


def configuration_of(row: dict[str, Any]) -> Configuration:
    """The configuration that a row measured."""
    return Configuration(**{field.name: row[field.name] for field in fields(Configuration)})


def groups(rows: Iterable[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Rows that may be compared, by what they share, in the order of `METHODS`."""
    order = list(METHODS)
    grouped: dict[str, list[dict[str, Any]]] = {}
    for row in sorted(rows, key=lambda row: (order.index(row["method"]), row["fraction"])):
        grouped.setdefault(configuration_of(row).setting, []).append(row)
    return grouped


def table(rows: Sequence[dict[str, Any]], peak_tflops: float) -> str:
    """All rows in Markdown, one table per group, and what they mean."""
    lines = []
    for title, members in groups(rows).items():
        lines += [f"**{title}**", "", f"| {' | '.join(COLUMNS)} |", "|---" + "|---:" * (len(COLUMNS) - 1) + "|"]
        lines += [f"| {' | '.join(_cells(row, members, peak_tflops))} |" for row in members if not row["error"]]
        lines += [""] + [f"- {configuration_of(row).label}: {row['error']}" for row in members if row["error"]] + [""]
    used = {row["method"] for row in rows}
    lines += [f"- `{name}`: {meaning}" for name, meaning in METHODS.items() if name in used]
    return "\n".join([*lines, "", *_notes(peak_tflops), "", *origins(rows)])


def _cells(row: dict[str, Any], group: Sequence[dict[str, Any]], peak_tflops: float) -> list[str]:
    utilisation = row["tokens_per_second"] * row["flops_per_token"] / (peak_tflops * 1e12)
    time, peak = row["ms_per_step"], row["peak_bytes"]
    bound = _find(group, "bound", row["fraction"])
    full = _find(group, "full", Configuration.fraction)
    return [
        configuration_of(row).label,
        f"{time:.1f}",
        f"{row['ms_p10']:.1f}-{row['ms_p90']:.1f}",
        *(f"{row[phase]:.1f}" if row[phase] is not None else "-" for phase in PHASES),
        f"{row['tokens_per_second']:.0f}",
        f"{utilisation:.1%}",
        *(gigabytes(row[name]) for name in ("peak_bytes", "steady_bytes", "initial_peak_bytes")),
        f"{row['moved_bytes_per_step'] / 1e9:.2f}",
        f"{row['exposed_ms']:.2f}" if row["exposed_ms"] is not None else "-",
        f"{time / bound['ms_per_step']:.3f}" if bound else "-",
        f"{full['ms_per_step'] / time:.2f}" if full else "-",
        f"{peak / full['peak_bytes']:.3f}" if full and full["peak_bytes"] else "-",
    ]


def _find(group: Sequence[dict[str, Any]], method: str, fraction: float) -> dict[str, Any] | None:
    found = (row for row in group if (row["method"], row["fraction"], row["error"]) == (method, fraction, None))
    return next(found, None)


def gigabytes(number: float | None) -> str:
    """Bytes as 10^9 with two digits, a dash for nothing."""
    return f"{number / 1e9:.2f}" if number else "-"


def _notes(peak_tflops: float) -> list[str]:
    return [
        "ms/step: median over the measured steps, of the slowest rank; 10-90 %: its percentiles. Memory: what PyTorch "
        "allocated (GB = 10^9 bytes), of the fullest rank. init: peak from before the model is built until training "
        "can begin. moved: optimizer states copied per step and GPU, both directions. exposed: time per step that the "
        "compute stream waited for them, without what the host waited. MFU: the arithmetic of full fine-tuning, 6 x "
        "(weights of all matrix products) + 6 x layers x heads x head size x sequence (attention, causal half) per "
        f"token, per {peak_tflops:g} TFLOP/s; recomputation is not counted.",
    ]


def origins(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Date, hardware, versions and command of the rows; one line for each that differs."""
    return list(dict.fromkeys(f"{row['date']}, {row['device']}, {row['versions']}: `{row['command']}`" for row in rows))


def draw(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Time by phase and peak memory of every group, as horizontal bars."""
    try:
        from matplotlib.figure import Figure
        from matplotlib.layout_engine import ConstrainedLayoutEngine
    except ImportError:
        print("no picture without matplotlib: pip install 'agsel[bench]', then --table_only")
        return
    grouped = groups(row for row in rows if not row["error"])
    heights = [len(members) + 1.5 for members in grouped.values()]
    if not grouped:
        return
    figure = Figure(figsize=(11, 0.3 * sum(heights) + 0.8), layout=ConstrainedLayoutEngine(w_pad=0.12))
    axes = figure.subplots(len(grouped), 2, squeeze=False, height_ratios=heights)
    for (times, memory), (title, members) in zip(axes, grouped.items(), strict=True):
        _draw_group(times, memory, title, members)
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside upper right", ncols=3, frameon=False)
    figure.suptitle("bold: agsel's methods", x=0.01, ha="left", fontsize="small", fontweight="bold")
    figure.savefig(path, dpi=150)


def _draw_group(times: Any, memory: Any, title: str, rows: Sequence[dict[str, Any]]) -> None:
    labels = [configuration_of(row).label for row in rows]
    left = [0.0] * len(rows)
    for phase, colour in PHASES.items():
        widths = [phase_widths(row)[phase] for row in rows]
        times.barh(labels, widths, left=left, color=colour, label=phase.removesuffix("_ms"))
        left = [start + width for start, width in zip(left, widths, strict=True)]
    undivided = [row["ms_per_step"] - drawn for row, drawn in zip(rows, left, strict=True)]
    times.barh(labels, undivided, color="#8c8c8c")
    peaks = [(row["peak_bytes"] or 0) / 1e9 for row in rows]
    memory.barh(labels, peaks, color="#8172b3")
    times.set_title(f"{title}: ms/step", fontsize="small", loc="left")
    memory.set_title("peak GB per GPU", fontsize="small", loc="left")
    for axis, lengths in ((times, [row["ms_per_step"] for row in rows]), (memory, peaks)):
        for position, length in enumerate(lengths):
            axis.text(length, position, f" {length:.3g}", va="center", fontsize="x-small")
        axis.set_xlim(0, 1.1 * max(lengths) or 1)
        axis.invert_yaxis()
        axis.tick_params(labelsize="small")
        for label, row in zip(axis.get_yticklabels(), rows, strict=True):
            label.set_fontweight("bold" if row["method"] in MOVING_STATES else "normal")
        axis.spines[["top", "right"]].set_visible(False)


def phase_widths(row: dict[str, Any]) -> dict[str, float]:
    """Each phase's share of the median step: the medians of the phases do not sum to it. Zeros without phases."""
    times = {phase: row[phase] or 0.0 for phase in PHASES}
    scale = row["ms_per_step"] / (sum(times.values()) or 1)
    return {phase: time * scale for phase, time in times.items()}


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    several: dict[str, Any] = {"nargs": "+"}
    switch: dict[str, Any] = {"nargs": "+", "choices": ("on", "off")}
    parser.add_argument("--models", default=["qwen2.5-0.5b"], help="built-in shape, folder or hub name", **several)
    parser.add_argument("--stages", default=[2], type=int, help="ZeRO stages", **several)
    parser.add_argument(
        "--methods", default=["full", "bound", "exploit", "explore"], help=", ".join(METHODS), **several
    )
    parser.add_argument("--ranks", default=[2], type=int, help="processes, one a GPU", **several)
    parser.add_argument("--fractions", default=[0.3], type=float, help="shares of the layers", **several)
    parser.add_argument("--shapes", default=["8x512"], help="rows x tokens of a micro-batch per GPU", **several)
    parser.add_argument(
        "--liger", default=["none"], choices=list(LIGER), help="its fused loss alone, or all of its kernels", **several
    )
    parser.add_argument("--checkpointing", default=["off"], help="gradient checkpointing", **switch)
    parser.add_argument("--compile", default=["off"], help="compile every decoder layer", **switch)
    parser.add_argument("--offload_states", default=["on"], help="agsel's own offloading", **switch)
    parser.add_argument("--accumulation", default=[1], type=int, help="gradient accumulation steps", **several)
    parser.add_argument("--plan", type=Path, help="YAML list of option sets, instead of the options above")
    parser.add_argument("--rounds", type=int, default=1, help="times to measure everything; the table shows the median")
    parser.add_argument("--steps", type=int, default=20, help="measured steps")
    parser.add_argument("--warmup", type=int, default=5, help="steps before them; more, if layers compile")
    parser.add_argument("--profile", action="store_true", help="also profile three steps of rank 0's main thread")
    parser.add_argument("--output", default="runs/bench", help="folder for rows, table and picture; rows are added")
    parser.add_argument("--table_only", action="store_true", help="make table and picture again, measure nothing")
    parser.add_argument("--peak_tflops", type=float, default=989, help="of one GPU, for the MFU; H100 and H200: 989")
    return parser


if __name__ == "__main__":
    main()
