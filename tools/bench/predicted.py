"""Predicted against measured ms/step, for rows of tools/bench.py.

python tools/bench.py --plan tools/bench_predicted.yaml --steps 8 --warmup 3 --output runs/predicted
python tools/bench_predicted.py runs/predicted        # writes predicted.md there

One number is fitted for each model: how slow GPU and Python are on that machine, so that its row of full fine-tuning on
the fewest GPUs, at the lowest ZeRO stage, is predicted as measured. Compare rows of one machine only.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path

from agsel import shipped
from agsel.errors import AgselError, UserError, one_line
from agsel.planning.duration import Speeds, StepTime, calibrated, host_speed, step_time
from agsel.planning.memory import PlannedStep, Planner, meta_model
from agsel.planning.rehearsal import Trace, Workload, ZeroSettings
from agsel.planning.shapes import model_config
from agsel.planning.traffic import Cluster
from agsel.policies import blocks_of_fraction
from tools.bench.configurations import Configuration
from tools.bench.rows import Row, configuration_of, measured_rows, origins

KINDS: dict[str, PlannedStep] = {"full": "full", "exploit": "exploit", "explore": "explore"}
"""Methods of the benchmark that are predicted -> kind of their steps."""
HEAD = ("setting", "method", "measured ms", "predicted ms", "predicted / measured")


def main(arguments: Sequence[str]) -> None:
    """Write the table."""
    folder = _parser().parse_args(arguments).folder
    try:
        rows = predictable(measured_rows(folder))
        text = "\n".join([*table(rows), "", *origins(rows)])
    except (AgselError, OSError) as error:
        sys.exit(f"agsel: error: {one_line(error)}")
    (folder / "predicted.md").write_text(text + "\n")
    print(text)


def predictable(rows: Sequence[Row]) -> list[Row]:
    """Rows that succeeded, of methods that are predicted."""
    return [row for row in rows if not row["error"] and row["method"] in KINDS]


def table(rows: Sequence[Row]) -> list[str]:
    """Lines of Markdown, a row each, and how good they are together.

    Raises:
        UserError: a model has no row to calibrate on.
    """
    lines = [f"| {' | '.join(HEAD)} |", "|---|---|---:|---:|---:|"]
    ratios = []
    for model in dict.fromkeys(row["model"] for row in rows):
        reference = reference_row(rows, model)
        speeds = speeds_of(reference)
        for row in (row for row in rows if row["model"] == model):
            configuration = configuration_of(row)
            ratio = 1000 * predicted(configuration, speeds).total / row["ms_per_step"]
            fitted = row is reference
            cells = [configuration.setting, configuration.label, f"{row['ms_per_step']:.0f}"]
            cells += [f"{ratio * row['ms_per_step']:.0f}", "fitted" if fitted else f"{ratio:.2f}"]
            lines.append(f"| {' | '.join(cells)} |")
            ratios += [] if fitted else [ratio]
        lines.append(f"| {model} | | | | slowness {speeds.slowness:.2f} |")
    within = sum(0.8 <= ratio <= 1.2 for ratio in ratios)
    return [*lines, "", f"{within} of {len(ratios)} rows within 20 %."]


def slowness_of_model(folder: Path, model: str) -> float:
    """How slow GPU and Python were when the rows of a folder were measured, by a row of full fine-tuning.

    Raises:
        UserError: there are no rows, or none of the model.
    """
    return speeds_of(reference_row(measured_rows(folder), model)).slowness


def reference_row(rows: Sequence[Row], model: str) -> Row:
    """The row of a model to calibrate on: full fine-tuning on the fewest GPUs, there at the lowest stage.

    Raises:
        UserError: there is none.
    """
    full = [row for row in predictable(rows) if (row["model"], row["method"]) == (model, "full")]
    if not full:
        raise UserError(f"no row of full fine-tuning of {model} to calibrate on: measure one, --methods full --ranks 1")
    return min(full, key=lambda row: (row["ranks"], row["stage"]))


def speeds_of(row: Row) -> Speeds:
    """The speeds with which a row of full fine-tuning is predicted as it was measured."""
    configuration = configuration_of(row)
    trace, cluster = rehearsed(configuration)[0], cluster_of(configuration)
    return calibrated(trace, cluster, Speeds(), row["ms_per_step"] / 1000, configuration.accumulation)


def predicted(configuration: Configuration, speeds: Speeds) -> StepTime:
    """How long a step of a configuration takes."""
    trace, moved = rehearsed(configuration)
    return step_time(
        trace,
        cluster_of(configuration),
        replace(speeds, host=host_speed(configuration.ranks)),
        accumulation=configuration.accumulation,
        moved=moved if configuration.method == "exploit" else 0,
        explores=configuration.method == "explore",
    )


def cluster_of(configuration: Configuration) -> Cluster:
    """All ranks of the benchmark are on one host."""
    return Cluster(ranks=configuration.ranks, ranks_per_host=configuration.ranks)


@cache
def rehearsed(configuration: Configuration) -> tuple[Trace, float]:
    """What a step computes and sends, and the bytes of states that it moves if its layers are drawn anew."""
    planner = Planner(
        meta_model(model_config(configuration.model)),
        workload_of(configuration),
        offload_states=configuration.offload_states,
    )
    count = blocks_of_fraction(configuration.fraction, planner.number_of_blocks)
    return planner.trace(KINDS[configuration.method], count), planner.moved_by_new_choice(count)


def workload_of(configuration: Configuration) -> Workload:
    """The batch and the kernels of a configuration."""
    return Workload(
        zero=ZeroSettings.of(shipped.configuration_of_stage(configuration.stage)["zero_optimization"]),
        ranks=configuration.ranks,
        micro_batch=configuration.micro_batch,
        sequence=configuration.sequence,
        accumulation=configuration.accumulation,
        checkpointing=configuration.checkpointing,
        compiled=configuration.compile,
        liger_layers=configuration.liger == "all",
        loss="transformers" if configuration.liger == "none" else "liger",
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        usage=argparse.SUPPRESS,
        prog="bench_predicted.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folder", type=Path, help="--output of tools/bench.py")
    return parser


if __name__ == "__main__":
    main(sys.argv[1:])
