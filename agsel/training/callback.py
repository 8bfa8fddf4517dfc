"""What a run shows while it trains: the status line, numbers for every logger, and `selection.json` at its end."""

import json
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tqdm import tqdm
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from agsel.errors import one_line
from agsel.monitor import (
    NORM,
    SelectionHistory,
    block_ranges,
    count_levels,
    duration,
    has_results_of_tasks,
    selection_scalars,
    status_line,
)
from agsel.replacing import replace_file
from agsel.training.gauges import Gauges
from agsel.training.record import Record
from agsel.zero import Selection, StepReport

MOST_OF_ONE_BLOCK = 0.9


class SelectionCallback(TrainerCallback):
    """Prints the status line, adds numbers to what the Trainer logs, writes `selection.json`.

    It must be the first callback of its Trainer: those after it, as TensorBoard's, are given its numbers too.

    Attributes:
        selection: of the run, once agsel is attached to its engine.
        history: of the selection, on the first rank.
        record: of the run, if it keeps one.
        counts: how often each block was updated, up to the last step, whatever checkpoint is loaded after it.
    """

    def __init__(self, trainer: Trainer) -> None:
        self.selection: Selection | None = None
        self.record: Record | None = None
        self.history = SelectionHistory(())
        self.counts: dict[str, int] = {}
        self._trainer = trainer
        self._gauges: Gauges | None = None  # while the Trainer trains, on the first rank
        self._losses: dict[str, list[float]] = {"loss": [], "eval_loss": []}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """The clocks start."""
        if not state.is_world_process_zero:
            return
        assert self.selection is not None
        blocks = self.selection.blocks
        self.history = self.record.begin(blocks, state.global_step) if self.record else SelectionHistory(blocks)
        self._reported = len(self.history.modes)
        self._count()
        self._first_step, self._began = state.global_step, time.perf_counter()
        self._gauges = Gauges(self.selection, args, self._trainer.model)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """The rows of the step are there."""
        if self._gauges is not None:
            self._gauges.step_begins()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Remember what the step did; the first and the last one are logged whatever `logging_steps` is."""
        if self._gauges is not None:
            self._gauges.step_ends()
            last = self._last_step()
            self.history.add(state.global_step, last.mode, last.selected, last.norms)
            self._count()
            if self.record:
                self.record.step(self.history)
        if state.global_step in (1, state.max_steps):
            control.should_log = True

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Add the numbers of a training step to what is logged, and print the status line."""
        numbers = {} if logs is None else logs
        is_shown = self._losses.keys() & numbers.keys() or has_results_of_tasks(numbers)
        if not state.is_world_process_zero or not is_shown:
            return
        for name, losses in self._losses.items():
            losses += [numbers[name]] if name in numbers else []
        choice, times = "", None
        if self._gauges is not None and "loss" in numbers:
            numbers |= self._gauges.read(numbers.get("num_tokens")) | self._scalars()
            choice, times = self._choice(), self._times(state)
        # There are too many norms for the Trainer's state.
        kept = {name: value for name, value in numbers.items() if not name.startswith(NORM)}
        state.log_history[-1] |= kept
        if self._gauges is not None and self.record:
            self.record.log(state.global_step, kept)
        _say(status_line(state.global_step, state.max_steps, numbers, choice, times))
        self._pause_ends()

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """An evaluation is no step."""
        self._pause_ends()

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Nor is a checkpoint."""
        self._pause_ends()
        if self._gauges is not None and self.record:
            self.record.synchronise()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Write how often each block was trained to `<output_dir>/selection.json`, and say it; say what checks cost."""
        if self._gauges is None or self.selection is None:
            return
        policy = self.selection.policy
        report = policy.settings() | {
            "steps": self._counted_steps,
            "blocks": list(self.selection.blocks),
            "counts": self.counts,
        }
        try:
            replace_file(Path(args.output_dir, "selection.json"), json.dumps(report, indent=2) + "\n")
        except OSError as error:  # the trained model is not lost for it
            _say(f"warning   selection.json is not written: {one_line(error)}")
        if self.record:
            self.record.end()
        _say(f"trained   {self._summary(state, self._gauges)}")
        _say(f"blocks    {count_levels(self.counts)}")
        if (warning := warning_of(self.counts, policy.spread_by)) is not None:
            _say(f"warning   {warning}")
        if self.selection.sanity is not None:
            _say(str(self.selection.sanity))
        self._gauges = None

    def _count(self) -> None:
        assert self.selection is not None
        self.counts, self._counted_steps = self.selection.counts, self.selection.policy.step

    def _pause_ends(self) -> None:
        if self._gauges is not None:
            self._gauges.pause_ends()

    def _summary(self, state: TrainerState, gauges: Gauges) -> str:
        """For example `200 steps in 0:06:42, loss 2.3101 -> 1.4321, eval loss 1.5102, peak 18.7 GB`."""
        parts = [f"{state.global_step - self._first_step:,} steps in {duration(time.perf_counter() - self._began)}"]
        for name, losses in self._losses.items():
            if losses:
                before = f"{losses[0]:.4f} -> " if len(losses) > 1 else ""
                parts.append(f"{name.replace('_', ' ')} {before}{losses[-1]:.4f}")
        peak = gauges.peak_gigabytes()
        return ", ".join([*parts, *([f"peak {peak:.1f} GB"] if peak else [])])

    def _times(self, state: TrainerState) -> tuple[float, float]:
        """Seconds since the first step of this process, and those that are left at its speed."""
        passed, done = time.perf_counter() - self._began, state.global_step - self._first_step
        return passed, passed * (state.max_steps - state.global_step) / max(1, done)

    def _last_step(self) -> StepReport:
        assert self.selection is not None
        assert self.selection.last is not None
        return self.selection.last

    def _choice(self) -> str:
        assert self.selection is not None
        last = self._last_step()
        mode = last.mode if last.epsilon is None else f"{last.mode} ε {last.epsilon:.2f}"
        return f"{mode}  {block_ranges(last.selected)}"

    def _scalars(self) -> dict[str, float]:
        assert self.selection is not None
        last, modes = self._last_step(), self.history.modes[self._reported :]
        self._reported = len(self.history.modes)
        return selection_scalars(
            counts=self.counts,
            selected=last.selected,
            norms=last.norms,
            explored=modes.count("explore") / max(1, len(modes)),
            skipped=self.history.modes.count("skipped"),
            epsilon=last.epsilon,
        )


def _say(line: str) -> None:
    """Above a progress bar; what the terminal has no letters for becomes question marks."""
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    tqdm.write(line.encode(encoding, "replace").decode(encoding))


def warning_of(counts: Mapping[str, int], spread_by: str) -> str | None:
    """What a user should know of a selection that kept to few blocks, with the setting to change."""
    idle = [name for name, count in counts.items() if not count]
    most, total = max(counts.values()), sum(counts.values())
    if len(counts) > 1 and most > MOST_OF_ONE_BLOCK * total:
        favourite = next(name for name, count in counts.items() if count == most)
        return f"{block_ranges([favourite])} took {most:,} of {total:,} turns of {len(counts)} blocks: {spread_by}"
    if not total:
        return "nothing was trained: every step was skipped, or only measured"
    if not idle:
        return None
    return f"never trained: {block_ranges(idle)}, {len(idle)} of {len(counts)} blocks: {spread_by}"
