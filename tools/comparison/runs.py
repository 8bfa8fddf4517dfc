"""One run: trained by launch/train.py, unless it has been, and measured by launch/evaluate.py."""

from __future__ import annotations

import json
import os
import shutil
import socket
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from agsel.errors import RunError, UserError
from agsel.runs.folder import FILE_OF_ELEMENTS
from tools.comparison.children import Children
from tools.comparison.chosen_rates import may_be_chosen
from tools.comparison.differences import Judged
from tools.comparison.origin import contents_of, describe_origin
from tools.comparison.places import Place
from tools.comparison.plan import Part, Plan, Run, words_of
from tools.comparison.records import Record, Records, differences_of, new_record
from tools.comparison.refusals import write_shared

LAUNCH = Path(__file__).resolve().parents[2] / "launch"
SHARED = "shared.yaml"
IDENTITY = "run.json"
"""In the folder of a run: what it is done with."""


@dataclass(frozen=True)
class Task:
    """A run to train, if it is not trained yet, and to measure on a part.

    After the validation part comes the test part at once, unless another learning rate of the cell is known to be
    better: later the weights may be gone.
    """

    run: Run
    part: Part


class Runner:
    """Trains and measures runs of a plan.

    Args:
        plan: of the comparison.
        records: what is known of its runs.
        children: starts the processes.
        processes: how many runs there may be at once; they share the processor.

    Raises:
        UserError: the folder of a run that has not ended is of other settings.
    """

    def __init__(self, plan: Plan, records: Records, children: Children, processes: int) -> None:
        self._plan = plan
        self._records = records
        self._contents = contents_of(plan)
        self._children = children
        self._threads = max(1, (os.cpu_count() or 1) // (processes * plan.gpus_per_run))
        write_shared(plan, plan.output / SHARED)
        for run in plan.all_runs():
            self._require_own(run)

    def _require_own(self, run: Run) -> None:
        """Refuse a folder that training would go on from, or that would be measured, if it is of other settings."""
        folder = run.folder(self._plan.output)
        begun = (folder / "result.json").is_file() or any(folder.glob("checkpoint-*"))
        if (run in self._records and not self._records[run]["error"]) or not begun:
            return
        identity = folder / IDENTITY
        new = new_record(self._plan, run, self._contents)
        differing = differences_of(new, json.loads(identity.read_text())) if identity.is_file() else ["plan"]
        if differing:
            raise UserError(
                f"{folder} has {run} with another {', '.join(differing)}: choose another output for the changed plan, "
                "or delete that folder"
            )

    def perform(self, task: Task, place: Place, slot: int) -> Record:
        """Do a task in a slot of a place. Returns what is known of the run then, an error included.

        Args:
            task: to do.
            place: where.
            slot: of the place.
        """
        begin = time.monotonic()
        known = self._records.get(task.run)
        before = {} if known is None or known["error"] else known
        record = {**before, **new_record(self._plan, task.run, self._contents)}
        record["environment"] = describe_origin(self._plan, on_gpu=bool(place.gpus))
        try:
            if not task.run.is_untrained:
                record |= self._trained(task.run, place, slot)
            if task.part == "validation":
                record["validation"] = self._measured(task.run, "validation", place, slot)
            if task.part == "test" or may_be_chosen(self._plan, self._records, task.run, record):
                record |= self._tested(task.run, place, slot)
        except (RunError, OSError, ValueError) as error:
            record["error"] = str(error)
        record["seconds"] = round(max(time.monotonic() - begin, record.get("seconds", 0.0)), 1)
        return record

    def _tested(self, run: Run, place: Place, slot: int) -> dict[str, Any]:
        """What came of the rows of the test part, and what else is measured with it."""
        parts = [part for part in self._plan.parts if part != "validation"]
        found: dict[str, Any] = {part: self._measured(run, part, place, slot) for part in parts}
        return {**found, "judged": Judged.read(run.folder(self._plan.output) / "test.jsonl")}

    def _trained(self, run: Run, place: Place, slot: int) -> dict[str, Any]:
        """What a run cost, after training it if it has not been trained to its end."""
        folder = run.folder(self._plan.output)
        result = folder / "result.json"
        if not result.is_file():
            if not any(folder.glob("checkpoint-*")):
                shutil.rmtree(folder, ignore_errors=True)
                folder.mkdir(parents=True)
                identity = new_record(self._plan, run, self._contents)
                (folder / IDENTITY).write_text(json.dumps(identity, default=str))
            command = self._command("train.py", place, train_words(self._plan, run))
            self._children.run(command, folder / "train.log", self._environment(place, slot))
        if not result.is_file():
            raise RunError(f"was told to stop before its end (see {folder / 'train.log'})")
        return {"result": json.loads(result.read_text()), "file_bytes": file_bytes(folder)}

    def _measured(self, run: Run, part: Part, place: Place, slot: int) -> dict[str, Any]:
        folder = run.folder(self._plan.output)
        words = [*evaluate_words(self._plan, run, part), *share_of(self._plan, place)]
        command = self._command("evaluate.py", place, words)
        self._children.run(command, folder / f"{part}.log", self._environment(place, slot))
        results = json.loads((folder / f"{part}.json").read_text())
        return {name: value for name, value in results.items() if name != "model"}

    def _command(self, script: str, place: Place, words: list[str]) -> list[str]:
        """One process needs no launcher; DeepSpeed's starts one for each visible GPU."""
        program = [str(LAUNCH / script), *words]
        if self._plan.gpus_per_run == 1:
            return [sys.executable, *program]
        ranks = [] if place.gpus else ["--num_gpus", str(self._plan.gpus_per_run)]
        launcher = [sys.executable, "-m", "deepspeed.launcher.runner", "--master_port", str(_free_port()), *ranks]
        return [*launcher, *program]

    def _environment(self, place: Place, slot: int) -> dict[str, str]:
        """Runs at the same time share neither GPUs' numbers, nor threads, nor the caches of compiled kernels."""
        caches = (self._plan.output / ".caches" / "-".join([*place.gpus, str(slot)])).resolve()
        own = {"TRITON_CACHE_DIR": str(caches / "triton"), "TORCHINDUCTOR_CACHE_DIR": str(caches / "inductor")}
        path = os.pathsep.join([str(LAUNCH.parent), *filter(None, [os.environ.get("PYTHONPATH")])])
        shared = {"OMP_NUM_THREADS": str(self._threads), **os.environ, "PYTHONPATH": path}
        return {**shared, **own, **place.environment()}


def train_words(plan: Plan, run: Run) -> list[str]:
    """The command line of launch/train.py."""
    own = {"learning_rate": run.learning_rate, "seed": run.seed, "output_dir": run.folder(plan.output)}
    words = ["--config", str(plan.output / SHARED), *words_of(plan.cells[run.cell].settings), *plan.words]
    return [*words, *words_of(own), "--resume_from_checkpoint", "auto"]


def evaluate_words(plan: Plan, run: Run, part: Part) -> list[str]:
    """The command line of launch/evaluate.py."""
    folder = run.folder(plan.output)
    model = plan.shared["model_name_or_path"] if run.is_untrained else folder / "model"
    place = {"model": model, "output": folder / f"{part}.json"}
    return [*words_of({**place, **plan.evaluation_of(run, part)})]


def share_of(plan: Plan, place: Place) -> list[str]:
    """Flags of launch/evaluate.py beside other runs: it would take half of what they have yet to ask for."""
    if not place.gpus or plan.runs_per_gpu == 1:
        return []
    return ["--memory_fraction", f"{1 / plan.runs_per_gpu:.3f}"]


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def file_bytes(folder: Path) -> int:
    """Of what a run has trained: the single weights, else the adapter or the model."""
    elements = folder / FILE_OF_ELEMENTS
    weights = [elements] if elements.is_file() else (folder / "model").glob("*.safetensors")
    return sum(path.stat().st_size for path in weights)
