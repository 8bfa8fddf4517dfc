"""Memory of a run before it is started: GPU and host, by kind of step. Needs no GPU and no weights.

python tools/plan_memory.py --model qwen2.5-0.5b --gpus 2 --stage 2 --fraction 0.3 --micro_batch 8 --sequence 512

MODEL is a built-in shape, a folder or a hub name; only its config.json is read. `launch/train.py` prints the same plan.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from agsel.planning.description import describe_memory
from agsel.planning.memory import KINDS_OF_STEPS, Planner, meta_model
from agsel.planning.rehearsal import Workload, ZeroSettings
from agsel.planning.shapes import MODEL_SHAPES, model_config
from agsel.policies import blocks_of_fraction, fraction_of_blocks
from agsel.training.arguments import METHODS

REPOSITORY = Path(__file__).resolve().parent.parent


def main(arguments: list[str]) -> None:
    """Print the plan, and the largest fraction that fits."""
    options = _parser().parse_args(arguments)
    try:
        print(describe(options))
    except ImportError as error:
        sys.exit(f"agsel: error: {error}, which --liger needs: pip install 'agsel[liger]', or use --loss liger")
    except ValueError as error:
        sys.exit(f"agsel: error: {' '.join(str(error).split())}")


def describe(options: argparse.Namespace) -> str:
    """The plan of the options, as text.

    Raises:
        ValueError: an option is out of its range, there is no such model, or agsel does not support it.
    """
    if not 0 < options.fraction <= 1:
        raise ValueError(f"fraction must be in (0, 1], got {options.fraction} (--fraction)")
    for name in ("gpus", "gpus_per_host", "micro_batch", "sequence", "accumulation"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, got {value} (--{name})")
    if options.compile and options.stage == 3:
        raise ValueError("compiled layers do not work at ZeRO-3: use --stage 1 or 2, or leave out --compile")
    try:
        config = model_config(options.model)
    except OSError as error:
        raise ValueError(
            f"no model {options.model!r} (--model): neither {', '.join(MODEL_SHAPES)} nor a folder here, and from the "
            f"hub: {error}"
        ) from error
    planner = Planner(
        meta_model(config),
        workload(options),
        blocks="all" if options.method == "full" else options.blocks,
        offload_states=options.offload,
        ranks_per_host=options.gpus_per_host,
    )
    kinds = KINDS_OF_STEPS[options.method]
    total = planner.number_of_blocks
    count = total if options.method == "full" else blocks_of_fraction(options.fraction, total)
    most = planner.most_blocks(options.gpu_gb * 1e9, kinds)
    fitting = describe_fitting(options.method, most, total)
    return "\n".join(
        [describe_memory(planner.plan(count, (*kinds, "full"))), f"fits      {options.gpu_gb:g} GB: {fitting}"]
    )


def describe_fitting(method: str, most: int, total: int) -> str:
    """What a GPU can hold, when `most` of all blocks fit."""
    if method == "full":
        return f"{'all' if most == total else 'not all'} {total} blocks"
    if not most:
        return "not even one block"
    return f"at most {most} of {total} blocks per step (--fraction {fraction_of_blocks(most, total)})"


def workload(options: argparse.Namespace) -> Workload:
    """The batch, with the ZeRO settings of the shipped DeepSpeed configuration."""
    shipped = json.loads((REPOSITORY / "ds_configs" / f"zero{options.stage}.json").read_text())
    return Workload(
        zero=ZeroSettings.of(shipped["zero_optimization"]),
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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help=f"{', '.join(MODEL_SHAPES)}, a folder or a hub name")
    parser.add_argument("--gpus", type=int, default=2, help="data-parallel ranks")
    parser.add_argument("--gpus_per_host", type=int, help="ranks that share a host's memory; default: all")
    parser.add_argument("--stage", type=int, choices=(1, 2, 3), default=2, help="ZeRO stage")
    parser.add_argument("--method", choices=METHODS, default="adagradselect", help="as in launch/train.py")
    parser.add_argument("--fraction", type=float, default=0.3, help="share of the blocks updated per step")
    parser.add_argument("--blocks", choices=("layers", "all"), default="layers", help="blocks that take part")
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
    return parser


if __name__ == "__main__":
    main(sys.argv[1:])
