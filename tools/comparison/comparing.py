"""What methods learn and what they cost, side by side, by a plan.

python tools/compare_quality.py tools/comparison/smollm2-135m-gsm8k.yaml
python tools/compare_quality.py --config launch/recipes/smollm2-135m-gsm8k.yaml --ranks 2 \
    --runs full:2e-4 adagradselect:8e-4 random:4e-4

A plan has cells, each some flags of launch/train.py, and learning rates, seeds, and the rows of a validation and a test
part; the plans in tools/comparison/ show how it is written. Every learning rate of a cell is tried with the first seed.
That with the lowest NLL on the validation part is trained with the other seeds, and those runs are measured on the test
part. Runs take all GPUs; several share one where they fit. The plan's `output` receives a folder for each run,
`table.md`, `table.csv` and `pareto.png`. The same command goes on after a stop, and tries again what failed.

What came of the runs is in `runs.jsonl` there, or in the plan's `results`, a file that outlives folders and machines:
runs that it has are not repeated, wherever they took place, and files of several machines may be joined by `cat`. With
--minutes, nothing begins that would take longer than what is left, by the longest run of its cell, or by the median of
the cells for its first; what goes on at the end has a minute to save a checkpoint. --tables draws the tables from that
file alone, also before the last run.

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
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from agsel.errors import AgselError, UserError, one_line
from tools.comparison import pareto
from tools.comparison.children import Children
from tools.comparison.chosen_rates import chosen_rates
from tools.comparison.comparison_table import collect, markdown, write_csv
from tools.comparison.method_rates import parse_cell, plan_of_rates
from tools.comparison.origin import contents_of, said_of_origins
from tools.comparison.places import find_gpus, places, said_of_others
from tools.comparison.plan import BEFORE, Plan, Run
from tools.comparison.plan_file import read_plan
from tools.comparison.records import Record, Records
from tools.comparison.refusals import require_sound
from tools.comparison.runs import Runner, Task
from tools.comparison.schedule import Outcome, Schedule

OF_BOTH = ("plan", "minutes", "tables")
"""Arguments with a plan and without."""


def main(arguments: Sequence[str]) -> None:
    """Compare as the command line says; print and write the tables."""
    own, words = _split(arguments)
    options = _parser().parse_args(own)
    try:
        until = time.monotonic() + 60 * options.minutes
        plan = _plan_of(options, words)
        if options.tables:
            draw_tables(plan)
            return
        for line in require_sound(plan):
            print(line, flush=True)
        plan.output.mkdir(parents=True, exist_ok=True)
        with claimed(plan.output) as claim:
            failed = compare(plan, claim, until)
    except (AgselError, OSError) as error:
        sys.exit(f"agsel: error: {one_line(error)}")
    if failed:
        sys.exit(f"agsel: error: failed: {', '.join(map(str, failed))}; the same command tries them again")


def compare(plan: Plan, claim: int, until: float) -> list[Run]:
    """Do the runs that are not done yet, and write the tables after the last. Returns the runs that failed.

    Args:
        plan: that is sound.
        claim: file descriptor that keeps the output folder from others while a run goes on.
        until: of the monotonic clock, when all must have ended.

    Raises:
        UserError: there are runs with other settings, or too few GPUs.
    """
    records = Records(plan.records)
    records.require_of(plan, contents_of(plan))
    gpus = find_gpus()
    for line in said_of_others(gpus):
        print(line, flush=True)
    found = places(gpus, plan.gpus_per_run)
    children = Children([claim])
    runner = Runner(plan, records, children, len(found) * plan.runs_per_gpu)
    schedule = Schedule(found, plan.runs_per_gpu, until)
    comparison = Comparison(plan, records, schedule, runner, children)
    with ended_by_signals(children):
        comparison.perform()
    if schedule.left:
        print(f"left      {comparison.said_of_rest()}: no time for more, go on with the same command", flush=True)
    else:
        write_tables(plan, records)
    return [run for run in comparison.seen if records[run]["error"]]


def draw_tables(plan: Plan) -> None:
    """From what is known of the plan's runs.

    Raises:
        UserError: they have other settings, or nothing is known.
    """
    records = Records(plan.records)
    records.require_of(plan, {})
    if not [*records]:
        raise UserError(f"{plan.records} has no runs: leave out --tables, and they are done")
    plan.output.mkdir(parents=True, exist_ok=True)
    write_tables(plan, records)


class Comparison:
    """Does the runs of a plan, and says how far it is.

    Attributes:
        seen: the runs that have ended, now or in an earlier session; those that failed among them.
    """

    def __init__(self, plan: Plan, records: Records, schedule: Schedule, runner: Runner, children: Children) -> None:
        self.seen: dict[Run, None] = {}
        self._plan, self._records, self._schedule = plan, records, schedule
        self._runner, self._children = runner, children
        self._total = 1 + sum(len(cell.learning_rates) + len(plan.seeds) - 1 for cell in plan.cells.values())
        self._seconds: list[float] = []
        for run in records:
            schedule.note(records[run])

    def perform(self) -> None:
        """Do what there is time for.

        The model before training is measured, and every learning rate on the validation part, if there is a choice.
        When all rates of a cell have been tried, all seeds are trained at the best one, and measured on the test part.
        """
        tried = self._plan.tuning_runs() if self._plan.chooses_rates else []
        self._add([Task(Run(BEFORE), "test"), *(Task(run, "validation") for run in tried)])
        self._add_seeds(self._plan.cells)
        for outcome in self._schedule.perform(self._runner.perform, self._children.stop):
            self._records.put(outcome.task.run, outcome.record)
            self._say(outcome)
            if outcome.task.part == "validation":
                self._add_seeds([outcome.task.run.cell])

    def _add(self, tasks: Sequence[Task]) -> None:
        done = [task for task in tasks if self._records.has(task.run, task.part)]
        self.seen |= dict.fromkeys(task.run for task in done)
        self._schedule.add(task for task in tasks if task not in done)

    def _add_seeds(self, cells: Iterable[str]) -> None:
        """Of these cells, those of which every rate has been tried: each is to be named once."""
        choosing = self._plan.chooses_rates
        tried = [cell for cell in cells if not choosing or self.seen.keys() >= {*self._plan.tries(cell)}]
        chosen = chosen_rates(self._plan, self._records, tried)
        self._total -= (len(tried) - len(chosen)) * (len(self._plan.seeds) - 1)
        self._add([Task(run, "test") for run in self._plan.final_runs(chosen)])

    def said_of_rest(self) -> str:
        """How many runs there are still to do."""
        return f"{self._total - len(self.seen)} of {self._total} runs"

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
    accuracy = record.get("test", {}).get("accuracy")
    of_part = "" if outcome.task.part == "test" else "test "
    matched = "" if accuracy is None else f", {of_part}exact match {accuracy:.1%}"
    return f"{outcome.task.part} NLL {measured['nll']:.4f}{matched}"


def write_tables(plan: Plan, records: Records) -> None:
    """Into the plan's output; the Markdown is printed, too."""
    rows = collect(plan, records, chosen_rates(plan, records, plan.cells))
    origins = [record["environment"] for row in rows for record in row.records]
    text = f"{markdown(plan, records, rows)}\n\n{said_of_origins(origins)}"
    (plan.output / "table.md").write_text(text + "\n")
    write_csv(rows, plan.output / "table.csv")
    pareto.draw(rows, plan.output / "pareto.png")
    print(f"\n{text}")


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
    defaults = vars(_parser().parse_args([]))
    typed = any(vars(options)[name] != defaults[name] for name in defaults if name not in OF_BOTH)
    if options.plan is None and None in (options.config, options.runs):
        raise UserError("nothing to compare: name a PLAN.yaml, or --config and --runs")
    if options.plan is not None and (typed or words):
        raise UserError(
            "a plan says all there is to run: leave out --config, --runs, --heldout, --ranks, --output, --generate, "
            "and what follows --"
        )
    return plan_of_rates(options, words) if options.plan is None else read_plan(options.plan)


def _minutes(text: str) -> float:
    try:
        minutes = float(text)
    except ValueError:
        minutes = math.nan
    if not minutes > 0:
        raise argparse.ArgumentTypeError(f"{text} is no time: write a number above 0")
    return minutes


def _split(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """The words before and after `--`."""
    cut = words.index("--") if "--" in words else len(words)
    return list(words[:cut]), list(words[cut + 1 :])


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        usage=argparse.SUPPRESS,
        prog="compare_quality.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("plan", nargs="?", type=Path, metavar="PLAN.yaml")
    parser.add_argument(
        "--minutes", type=_minutes, default=math.inf, help="for all; what goes on then saves a checkpoint, if it can"
    )
    parser.add_argument("--tables", action="store_true", help="train nothing: draw the tables of what is known")
    typed = parser.add_argument_group("without a plan")
    typed.add_argument("--config", type=Path, help="recipe of launch/recipes/")
    typed.add_argument("--runs", nargs="+", type=parse_cell, metavar="METHOD:RATE[:STAGE]")
    typed.add_argument("--heldout", help="hub name or file with rows like the recipe's, in place of its test split")
    typed.add_argument("--ranks", type=int, default=2, help="processes of each run, one a GPU")
    typed.add_argument("--output", type=Path, default=Path("runs/comparison"), help="folder for the runs")
    typed.add_argument("--generate", action="store_true", help="also measure exact match by greedy generation (slow)")
    return parser
