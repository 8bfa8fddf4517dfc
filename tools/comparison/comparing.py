"""What methods learn and what they cost, side by side, by a plan.

python tools/compare_quality.py tools/comparison/smollm2-135m-gsm8k.yaml
python tools/compare_quality.py --config launch/recipes/smollm2-135m-gsm8k.yaml --ranks 2 \
    --runs full:2e-4 adagradselect:8e-4 random:4e-4

A plan has cells, each some flags of launch/train.py, and learning rates, seeds, and the rows of a validation and a test
part; the plans in tools/comparison/ show how it is written. Every learning rate of a cell is tried with the first seed.
That with the lowest NLL on the validation part is trained with the other seeds, and those runs are measured on the test
part. Runs take all GPUs; several share one where they fit. The plan's `output` receives a folder for each run,
`runs.jsonl`, `table.md`, `table.csv` and `pareto.png`. The same command goes on after a stop, and tries again what
failed.

Each of `--runs` is `METHOD:LEARNING_RATE`, optionally `:STAGE` (1, 2 or 3; default 2), a cell of a plan with one seed.
The rest comes from the recipe, and whatever follows `--` goes to launch/train.py as it is. The held-out rows are the
recipe's test split, or those of `--heldout`. Paths are of the folder where the command is typed.
"""

from __future__ import annotations

import argparse
import fcntl
import math
import signal
import statistics
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any, NoReturn

import torch

from agsel.errors import AgselError, UserError, one_line
from tools.comparison import pareto
from tools.comparison.children import Children
from tools.comparison.comparison_table import collect, markdown, validation_nll, write_csv
from tools.comparison.method_rates import parse_cell, plan_of_rates
from tools.comparison.places import find_gpus, places, said_of_others
from tools.comparison.plan import BEFORE, Plan, Run
from tools.comparison.plan_file import read_plan
from tools.comparison.records import Record, Records, new_record
from tools.comparison.refusals import require_sound
from tools.comparison.runs import Runner, Task
from tools.comparison.schedule import Outcome, Schedule

PACKAGES = ("torch", "deepspeed", "transformers", "trl", "peft")


def main(arguments: Sequence[str]) -> None:
    """Compare as the command line says; print and write the tables."""
    own, words = _split(arguments)
    options = _parser().parse_args(own)
    try:
        plan = _plan_of(options, words)
        for line in require_sound(plan):
            print(line, flush=True)
        plan.output.mkdir(parents=True, exist_ok=True)
        with claimed(plan.output) as claim:
            failed = compare(plan, claim)
    except (AgselError, OSError) as error:
        sys.exit(f"agsel: error: {one_line(error)}")
    if failed:
        sys.exit(f"agsel: error: failed: {', '.join(map(str, failed))}; the same command tries them again")


def compare(plan: Plan, claim: int) -> list[Run]:
    """Do all runs that are not done yet, then write the tables. Returns the runs that failed.

    Args:
        plan: that is sound.
        claim: file descriptor that keeps the output folder from others while a run goes on.

    Raises:
        UserError: the folder has runs with other settings, or there are too few GPUs.
        RunError: results of the runs cannot be read.
    """
    records = Records(plan.output / "runs.jsonl")
    records.require_of(plan)
    gpus = find_gpus()
    for line in said_of_others(gpus):
        print(line, flush=True)
    found = places(gpus, plan.gpus_per_run)
    children = Children([claim])
    runner = Runner(plan, children, len(found) * plan.runs_per_gpu)
    comparison = Comparison(plan, records, Schedule(found, plan.runs_per_gpu), runner)
    with ended_by_signals(children):
        chosen = comparison.choose_rates()
        comparison.test(chosen)
    write_tables(plan, records, chosen)
    return [run for run in comparison.seen if records[run]["error"]]


class Comparison:
    """Does the runs of a plan, and says how far it is.

    Attributes:
        seen: the runs that have ended, now or in an earlier session; those that failed among them.
    """

    def __init__(self, plan: Plan, records: Records, schedule: Schedule, runner: Runner) -> None:
        self.seen: dict[Run, None] = {}
        self._plan, self._records, self._schedule, self._runner = plan, records, schedule, runner
        self._total = 1 + sum(len(cell.learning_rates) + len(plan.seeds) - 1 for cell in plan.cells.values())
        self._seconds: list[float] = []
        for run in records:
            schedule.note(records[run])

    def choose_rates(self) -> dict[str, float]:
        """The learning rate with which each cell does best on the validation part; a cell that failed has none."""
        if not self._plan.chooses_rates:
            return {cell.name: cell.learning_rates[0] for cell in self._plan.cells.values()}
        self._perform([Task(run, "validation") for run in self._plan.tuning_runs()])
        chosen = {}
        for cell in self._plan.cells:
            tries = [run for run in self._plan.tuning_runs() if run.cell == cell]
            best = min(tries, key=lambda run: validation_nll(self._records, run))
            if math.isfinite(validation_nll(self._records, best)):
                chosen[cell] = best.learning_rate
        self._total -= (len(self._plan.cells) - len(chosen)) * (len(self._plan.seeds) - 1)
        return chosen

    def test(self, chosen: dict[str, float]) -> None:
        """Train all seeds at the chosen learning rates, and measure them on the test part."""
        self._perform([Task(run, "test") for run in [Run(BEFORE), *self._plan.final_runs(chosen)]])

    def _perform(self, tasks: Sequence[Task]) -> None:
        self.seen |= dict.fromkeys(task.run for task in tasks if self._records.has(task.run, task.part))
        missing = [task for task in tasks if not self._records.has(task.run, task.part)]
        known = {run: self._records[run] for run in self._records}
        for run in dict.fromkeys(task.run for task in missing):
            if run not in known or known[run]["error"]:  # if this ends before the run, its settings are known
                begun = {**known.get(run, {}), **new_record(self._plan, run), "error": "has not ended"}
                self._records.put(run, begun)
        for outcome in self._schedule.perform(
            missing, lambda task, place, slot: self._runner.perform(task, place, slot, known.get(task.run))
        ):
            self._records.put(outcome.task.run, outcome.record)
            self._say(outcome)

    def _say(self, outcome: Outcome) -> None:
        run = outcome.task.run
        if run not in self.seen and not run.is_untrained:
            self._seconds.append(outcome.seconds)
        self.seen[run] = None
        left = self._total - len(self.seen)
        mean = statistics.fmean(self._seconds) if self._seconds else 0.0
        remaining = f", {math.ceil(mean * left / outcome.at_once / 60)} min left" if self._seconds and left else ""
        print(f"run {len(self.seen)} of {self._total}{remaining}: {run}: {said_of(outcome)}", flush=True)


def said_of(outcome: Outcome) -> str:
    """What came of a task, in a few words."""
    record: Record = outcome.record
    if record["error"]:
        return f"failed: {record['error']}"
    measured = record[outcome.task.part]
    accuracy = measured.get("accuracy")
    matched = "" if accuracy is None else f", exact match {accuracy:.1%}"
    return f"{outcome.task.part} NLL {measured['nll']:.4f}{matched}"


def write_tables(plan: Plan, records: Records, chosen: dict[str, float]) -> None:
    """Into the plan's output; the Markdown is printed, too."""
    rows = collect(plan, records, chosen)
    text = f"{markdown(plan, records, rows)}\n\n{setting(plan)}"
    (plan.output / "table.md").write_text(text + "\n")
    write_csv(plan, rows, plan.output / "table.csv")
    pareto.draw(rows, plan.output / "pareto.png")
    print(f"\n{text}")


def setting(plan: Plan) -> str:
    """Date, hardware and versions."""
    gpus = find_gpus()
    device = f"{len(gpus)} x {torch.cuda.get_device_name()}" if gpus else "CPU"
    shared = f"{plan.gpus_per_run} a run, up to {plan.runs_per_gpu} runs at once on each" if gpus else "no GPU"
    versions = ", ".join(f"{package} {version(package)}" for package in PACKAGES)
    return f"{date.today()}, {device}, {shared}, {versions}."


@contextmanager
def claimed(folder: Path) -> Iterator[int]:
    """Have a folder for this comparison and its runs alone, after waiting for what another has left behind there."""
    with Path(folder, ".claim").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"waiting   for another comparison in {folder}, or for runs that it has left behind", flush=True)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield file.fileno()


@contextmanager
def ended_by_signals(children: Children) -> Iterator[None]:
    """Inside, SIGINT and SIGTERM end the children first, and say how to go on; a second one does not wait for them."""

    def end(number: int, frame: Any) -> NoReturn:
        restore()
        print("stopping  the runs save what they can; a second signal does not wait for them", flush=True)
        children.stop()
        sys.exit("agsel: error: stopped by a signal: go on with the same command")

    before = {number: signal.signal(number, end) for number in (signal.SIGINT, signal.SIGTERM)}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    try:
        yield
    finally:
        restore()


def _plan_of(options: argparse.Namespace, words: Sequence[str]) -> Plan:
    typed = vars(options) != vars(_parser().parse_args([] if options.plan is None else [str(options.plan)]))
    if options.plan is None and None in (options.config, options.runs):
        raise UserError("nothing to compare: name a PLAN.yaml, or --config and --runs")
    if options.plan is not None and (typed or words):
        raise UserError(
            "a plan says all there is to run: leave out --config, --runs, --heldout, --ranks, --output, --generate, "
            "and what follows --"
        )
    return plan_of_rates(options, words) if options.plan is None else read_plan(options.plan)


def _split(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """The words before and after `--`."""
    cut = words.index("--") if "--" in words else len(words)
    return list(words[:cut]), list(words[cut + 1 :])


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="compare_quality.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("plan", nargs="?", type=Path, metavar="PLAN.yaml")
    typed = parser.add_argument_group("without a plan")
    typed.add_argument("--config", type=Path, help="recipe of launch/recipes/")
    typed.add_argument("--runs", nargs="+", type=parse_cell, metavar="METHOD:RATE[:STAGE]")
    typed.add_argument("--heldout", help="hub name or file with rows like the recipe's, in place of its test split")
    typed.add_argument("--ranks", type=int, default=2, help="processes of each run, one a GPU")
    typed.add_argument("--output", type=Path, default=Path("runs/comparison"), help="folder for the runs")
    typed.add_argument("--generate", action="store_true", help="also measure exact match by greedy generation (slow)")
    return parser
