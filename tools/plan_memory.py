"""Memory, traffic and time of a run before it is started, by kind of step. Needs no GPU and no weights.

python tools/plan_memory.py --model qwen2.5-0.5b --gpus 2 --stage 2 --fraction 0.3 --micro_batch 8 --sequence 512
python tools/plan_memory.py --model llama-3.1-70b --gpus 1024 --gpus_per_host 8 --stage 3 --checkpointing --liger

MODEL is a built-in shape, a folder or a hub name; only its config.json is read. `launch/train.py` prints the same plan
of memory. Traffic and time are predicted for H100 or H200, with blocks drawn anew at every step, where whole weights
are trained; of `freezeout` those are of its first step. GB are 10^9 bytes, and ms of traffic those of the bytes alone.
tools/bench/README.md says how near predictions come.
"""

from __future__ import annotations

import argparse
import math
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, get_args

from transformers import PreTrainedConfig

from agsel import shipped
from agsel.blocks import find_blocks, taking_part
from agsel.elements import require_density
from agsel.errors import AgselError, UserError, one_line
from agsel.planning.description import describe_forecast, describe_memory
from agsel.planning.duration import Speeds, host_speed
from agsel.planning.forecast import Forecast
from agsel.planning.memory import Planner, meta_model, planned_steps, train_elements
from agsel.planning.rehearsal import Workload, ZeroSettings
from agsel.planning.rehearsal.liger_layers import is_liger_installed
from agsel.planning.shapes import MODEL_SHAPES, model_config
from agsel.planning.traffic import Cluster
from agsel.policies import METHODS, Policy, StepKind, flags_of, fraction_of_blocks, reads_fraction

TIMED = (*get_args(StepKind), "full")


def main(arguments: list[str]) -> None:
    """Print the plan, the largest fraction that fits, and the step times."""
    options = _parser().parse_args(arguments)
    try:
        print(describe(options))
    except AgselError as error:
        sys.exit(f"agsel: error: {one_line(error)}")


def describe(options: argparse.Namespace) -> str:
    """The plan of the options, as text.

    Raises:
        UserError: an option is out of its range, there is no such model, or agsel does not support it.
    """
    if not 0 < options.fraction <= 1:
        raise UserError(f"fraction must be in (0, 1], got {options.fraction} (--fraction)")
    for name in ("gpus", "gpus_per_host", "micro_batch", "sequence", "accumulation"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise UserError(f"{name} must be at least 1, got {value} (--{name})")
    for name in ("gpu_gb", "tflops", "link_gbs", "network_gbs", "host_gbs"):
        value = getattr(options, name)
        if value is not None and not 0 < value < math.inf:
            raise UserError(f"{name} must be a number above 0, got {value:g} (--{name})")
    cluster = Cluster(ranks=options.gpus, ranks_per_host=options.gpus_per_host or options.gpus)
    speeds = speeds_of(options)
    if options.compile and options.stage == 3:
        raise UserError("compiled layers do not work at ZeRO-3: use --stage 1 or 2, or leave out --compile")
    config = model_config(options.model)
    policy = policy_of(options)
    planner = Planner(
        trained_model(options, config, policy),
        workload(options),
        blocks=blocks_of(options, policy),
        select_from=options.select_from,
        offload_states=options.offload,
        policy=policy,
        ranks_per_host=options.gpus_per_host,
        fold_adapters=options.fold_adapters,
    )
    kinds = planned_steps(policy)
    most = planner.most_blocks(options.gpu_gb * 1e9, kinds)
    count = policy.started(planner.infos).blocks_per_step
    fitting = describe_fitting(policy, most, planner.number_of_blocks, count)
    of_weights = options.element_density is None and options.lora_r is None
    shown = (*kinds, "full") if of_weights else kinds
    text = [describe_memory(planner.plan(count, shown)), f"fits      {options.gpu_gb:g} GB: {fitting}"]
    if of_weights:
        timed = tuple(kind for kind in shown if kind in TIMED)
        forecast = Forecast(planner, count, timed, speeds, options.accumulation)
        text.append(describe_forecast(forecast, timed, cluster, speeds, options.gpu_gb))
    if options.liger and not options.compile and not is_liger_installed():
        text.append("assumed   what Liger's kernels keep, after Liger 0.8.5: liger-kernel or triton is not installed")
    return "\n".join(text)


def trained_model(options: argparse.Namespace, config: PreTrainedConfig, policy: Policy) -> Any:
    """Without weights: all of them are trained, or single ones, or adapters, which layers that do not take part lack.

    Raises:
        UserError: an option is out of its range, or goes with no other.
    """
    if options.lora_r is None:
        if policy.needs_adapters or options.fold_adapters:
            setting = "--fold_adapters" if options.fold_adapters else f"--method {options.method}"
            raise UserError(f"{setting} is for adapters: add --lora_r")
    elif options.element_density is not None:
        raise UserError("adapters or single weights are trained, not both: leave out --lora_r or --element_density")
    elif options.lora_r < 1:
        raise UserError(f"lora_r must be at least 1, got {options.lora_r} (--lora_r)")
    model = meta_model(config)
    if options.lora_r is not None:
        from tools.bench.starters import with_adapters  # found once `tools` is, see below

        blocks = taking_part(find_blocks(model), blocks_of(options, policy), options.select_from)
        return with_adapters(model, options.lora_r, blocks)
    if options.element_density is not None:
        require_density(options.element_density)
        train_elements(model, options.element_density)
    return model


def blocks_of(options: argparse.Namespace, policy: Policy) -> Literal["layers", "all"]:
    """Which ones take part: those of the method, if no others are named."""
    return options.blocks or policy.scope(options.select_from)


def speeds_of(options: argparse.Namespace) -> Speeds:
    """Of the hardware, as the options say."""
    host = options.host_gbs * 1e9 if options.host_gbs else host_speed(options.gpus_per_host or options.gpus)
    speeds = Speeds(link=options.link_gbs * 1e9, network=options.network_gbs * 1e9, host=host)
    if options.calibrate:
        if options.tflops:
            raise UserError("the measured row says how fast the GPU is: use --tflops or --calibrate")
        from tools.bench.predicted import slowness_of_model  # found once `tools` is, see below

        return replace(speeds, slowness=slowness_of_model(options.calibrate, options.model))
    return replace(speeds, flops=options.tflops * 1e12) if options.tflops else speeds


def policy_of(options: argparse.Namespace) -> Policy:
    """The method with the fraction, if it reads one, and its own settings otherwise."""
    policy = METHODS[options.method]
    fraction = flags_of(policy).get("select_fraction")
    built = policy(**{fraction.name: options.fraction} if fraction else {})
    built.complete(epoch_steps=1, run_steps=1)
    return built


def describe_fitting(policy: Policy, most: int, total: int, count: int) -> str:
    """What a GPU can hold, when `most` of all blocks fit and a step updates `count`."""
    if not reads_fraction(policy):
        per_step = f"all {total} blocks" if count == total else f"{count} of {total} blocks per step"
        return per_step if most >= count else f"not {per_step}"
    if not most:
        return "not even one block"
    return f"at most {most} of {total} blocks per step (--fraction {fraction_of_blocks(most, total)})"


def workload(options: argparse.Namespace) -> Workload:
    """The batch, with the ZeRO settings of the shipped DeepSpeed configuration."""
    return Workload(
        zero=ZeroSettings.of(shipped.configuration_of_stage(options.stage)["zero_optimization"]),
        ranks=options.gpus,
        micro_batch=options.micro_batch,
        sequence=options.sequence,
        accumulation=options.accumulation,
        checkpointing=options.checkpointing,
        compiled=options.compile,
        liger_layers=options.liger and not options.compile,
        loss="liger" if options.liger else options.loss,
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        usage=argparse.SUPPRESS, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, help=f"{', '.join(MODEL_SHAPES)}, a folder or a hub name")
    parser.add_argument("--gpus", type=int, default=2, help="data-parallel ranks")
    parser.add_argument("--gpus_per_host", type=int, help="ranks that share a host's memory; default: all")
    parser.add_argument("--stage", type=int, choices=(1, 2, 3), default=2, help="ZeRO stage")
    parser.add_argument("--method", choices=METHODS, default="adagradselect", help="as in launch/train.py")
    parser.add_argument("--fraction", type=float, default=0.3, help="share of the blocks updated per step")
    parser.add_argument("--element_density", type=float, help="train this share of single weights, as with --elements")
    parser.add_argument("--lora_r", type=int, help="train LoRA adapters of this rank on all linear layers")
    parser.add_argument("--fold_adapters", action="store_true", help="add adapters to their weights for the moment")
    parser.add_argument("--select_from", type=float, default=0, help="lowest layer that takes part, or a share below 1")
    part = "blocks that take part; default: the method's"
    parser.add_argument("--blocks", "--select_blocks", dest="blocks", choices=("layers", "all"), help=part)
    parser.add_argument("--micro_batch", type=int, default=8, help="rows per forward and GPU")
    parser.add_argument("--sequence", type=int, default=512, help="tokens per row")
    parser.add_argument("--accumulation", type=int, default=1, help="micro-batches per optimizer step")
    parser.add_argument("--checkpointing", action="store_true", help="gradient checkpointing")
    parser.add_argument("--compile", action="store_true", help="decoder layers compiled one by one")
    parser.add_argument(
        "--loss",
        choices=("trl", "liger", "transformers"),
        default="trl",
        help="TRL's fused loss, as in launch/train.py; Liger's; or the logits of all tokens",
    )
    parser.add_argument(
        "--liger", action="store_true", help="Liger's loss, and its kernels in the layers unless these are compiled"
    )
    parser.add_argument("--no-offload", dest="offload", action="store_false", help="all optimizer states on the GPU")
    parser.add_argument("--gpu_gb", type=float, default=139, help="memory of one GPU, in 10^9 bytes")
    parser.add_argument(
        "--tflops", type=float, help="10^12 operations per second in large matrix products; default 494.5"
    )
    parser.add_argument(
        "--calibrate",
        type=Path,
        metavar="FOLDER",
        help="--output of tools/bench.py: GPU and Python are as fast as in its row of full fine-tuning of the model",
    )
    parser.add_argument(
        "--link_gbs", type=float, default=360, help="GB/s each way and GPU over NVLink; 360: four fifths of 450"
    )
    parser.add_argument(
        "--network_gbs", type=float, default=45, help="GB/s each way and GPU between hosts; 45: nine tenths of 400 Gb/s"
    )
    parser.add_argument(
        "--host_gbs",
        type=float,
        help="GB/s each way between a GPU and host memory; default, as measured: 51 if it is the only one of its host, "
        "37 each of two, 22 each of more",
    )
    return parser


if __name__ == "__main__":
    sys.path.append(str(Path(__file__).resolve().parents[1]))
    main(sys.argv[1:])
