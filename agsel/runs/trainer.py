"""TRL's trainer with checkpoints that are complete or absent, and with an early, resumable end."""

from __future__ import annotations

import functools
import logging
import math
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import psutil
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import IntervalStrategy, TrainOutput
from trl import SFTTrainer

from agsel import upstream
from agsel.errors import RunError
from agsel.runs import checkpoints
from agsel.runs.preemption import StopRequests, start_worker
from agsel.zero.selection import TooManySkippedStepsError

logger = logging.getLogger("agsel")

RELIES_ON = {SFTTrainer: ("_inner_training_loop", "_maybe_log_save_evaluate")}
"""Methods whose inner working this module depends on, besides those that the code names."""


class StoppedInEvaluation(Exception):  # noqa: N818
    """The ranks have agreed to stop while they evaluated."""


class ResumableTrainer(SFTTrainer):
    """`SFTTrainer` whose runs can be killed at any moment and stopped at any step, after `make_resumable`.

    Attributes:
        last_saved: the newest checkpoint that this run has written or was resumed from.
        last_good: the newest of them after which a step had finite gradients.
    """

    last_saved: Path | None = None
    last_good: Path | None = None
    _requests: StopRequests | None = None
    _start_seconds: float | None = None
    _staging: Path | None = None

    @property
    def was_stopped(self) -> bool:
        """Whether the ranks have agreed to stop before the end."""
        return self._requests is not None and self._requests.agreed is not None

    def make_resumable(self, requests: StopRequests, run: dict[str, Any], group: Any) -> None:
        """Stop when the ranks agree to, and write checkpoints that tell what the run was like.

        Args:
            requests: to stop.
            run: for the manifests.
            group: process group of all ranks, on the host.

        Raises:
            RunError: this transformers or TRL differs from the tested one where agsel overrides it.
        """
        upstream.require_tested(__name__)
        self._requests, self._run, self._group = requests, run, group
        self.add_callback(_StepBorders(self, requests))

    def train(self, resume_from_checkpoint: str | None = None, **options: Any) -> TrainOutput:
        """`SFTTrainer.train`; if it stops for too many skipped steps, the error names the last good checkpoint.

        Raises:
            RunError: of agsel.
        """
        if resume_from_checkpoint is not None:
            self.last_saved = self.last_good = Path(resume_from_checkpoint)
        try:
            result = super().train(resume_from_checkpoint=resume_from_checkpoint, **options)
        except TooManySkippedStepsError as error:
            raise RunError(f"{error}; {describe(self.last_good)}") from error
        self._rotate()
        return result

    def _get_dataloader(self, *arguments: Any, **options: Any) -> Any:
        prepared = super()._get_dataloader(*arguments, **options)
        loader = prepared.base_dataloader  # Accelerate's wrapper reads it, but would keep what is set on itself
        loader.worker_init_fn = functools.partial(start_worker, loader.worker_init_fn)
        return prepared

    def _run_epoch(self, **options: Any) -> None:
        """Nothing is left to do for a run that is resumed after its last step, or has been stopped before its first.

        The Trainer would do one step more.
        """
        if self.state.global_step < self.state.max_steps and not self.was_stopped:
            super()._run_epoch(**options)
        else:
            self.control.should_training_stop = True

    def _finalize_training(self, *arguments: Any, **options: Any) -> TrainOutput:
        """A stopped run goes on from its newest checkpoint, in whose place the Trainer would keep and load the best."""
        best = self.state.best_model_checkpoint
        if self.was_stopped:
            self.state.best_model_checkpoint = None
        result = super()._finalize_training(*arguments, **options)
        self.state.best_model_checkpoint = best
        return result

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        folder, step, began = Path(self.args.output_dir), self.state.global_step, time.monotonic()
        try:
            with checkpoints.saving(folder, step, self._run, self._group) as staged:
                self._write_checkpoint(model, trial, staged)
        except Exception as error:
            if _is_of_collective(error):
                logger.error("the checkpoint of step %d is not complete: another rank has ended", step)
                sys.exit(1)
            reason = checkpoints.fault_of_disk(folder, error)
            if reason is None:
                raise
            raise RunError(
                f"the checkpoint of step {step} could not be written to {folder} ({reason}), "
                f"{describe(self.last_saved)}: make room or choose another folder (--output_dir), then resume"
            ) from error
        self.last_saved = folder / f"{checkpoints.PREFIX}{step}"
        self._say_lead_time(time.monotonic() - began)

    def training_begins(self) -> None:
        """The start is over, and has taken as long as this process is there. The best checkpoint is where it is now."""
        find_best(self.state, self.last_saved)
        self._start_seconds = time.time() - psutil.Process().create_time()
        if self.last_saved is not None and owes_evaluation(self.args, self.state):
            self._make_up_for_evaluation(self.last_saved)

    def _make_up_for_evaluation(self, resumed_from: Path) -> None:
        """The run was stopped in it, or instead of it."""
        metrics = self._evaluate(None, None)
        if self._determine_best_metric(metrics, None) and self.state.best_global_step == self.state.global_step:
            self.state.best_model_checkpoint = str(resumed_from)

    def _say_lead_time(self, save_seconds: float) -> None:
        """With the first checkpoint, how long before its end a job must be warned. On the first rank."""
        if self._start_seconds is not None and self.is_world_process_zero():
            start, save = math.ceil(self._start_seconds), math.ceil(save_seconds)
            sys.stdout.write(
                f"save      a save takes {save} s, the start took {start} s: warn a job at least {start + save} s "
                "before its end\n"
            )
            sys.stdout.flush()
        self._start_seconds = None

    def note_finite_step(self) -> None:
        """The newest checkpoint has proved good: the oldest may go."""
        if self.last_good != self.last_saved:
            self.last_good = self.last_saved
            self._rotate()

    def _rotate(self) -> None:
        """The one saved last is not the newest of the folder if the run was resumed from before others."""
        if self.is_world_process_zero():
            staying = filter(None, (self.last_saved, self.state.best_model_checkpoint))
            checkpoints.rotate(Path(self.args.output_dir), self.args.save_total_limit, *map(Path, staying))

    def _write_checkpoint(self, model: nn.Module, trial: Any, staged: Path) -> None:
        """Let the Trainer write into the staging folder, but not note that as the place of the best checkpoint."""
        best = self.state.best_model_checkpoint
        self._staging = staged.parent
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self._staging = None
        if self.state.best_global_step == self.state.global_step:
            best = str(Path(self.args.output_dir, staged.name))
        self.state.best_model_checkpoint = best
        if self.args.should_save:
            self.state.save_to_json(str(staged / TRAINER_STATE_NAME))

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Nothing: the Trainer would upload the whole run folder, logs included, and not the model that is in it."""

    def _get_output_dir(self, trial: Any) -> str:
        return super()._get_output_dir(trial) if self._staging is None else str(self._staging)

    def _evaluate(self, *arguments: Any, **options: Any) -> dict[str, float]:
        try:
            return super()._evaluate(*arguments, **options)
        except StoppedInEvaluation:
            self.control.should_save = True
            return {}

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        """An evaluation that was stopped has no metrics; its step is saved whatever `save_strategy` is."""
        return super()._determine_best_metric(metrics, trial) if metrics else True


class _StepBorders(TrainerCallback):
    """Asks the ranks at every step boundary and every evaluation batch whether to stop."""

    def __init__(self, trainer: ResumableTrainer, requests: StopRequests) -> None:
        self._trainer = trainer
        self._requests = requests

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """The model is loaded, and a checkpoint."""
        self._trainer.training_begins()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """To stop, save this step and end, without an evaluation before. A skipped step is not worth saving."""
        if self._trainer.deepspeed.selection.last.mode == "skipped":
            control.should_save = False
        else:
            self._trainer.note_finite_step()
        if self._requests.ask():
            control.should_training_stop = control.should_save = True
            control.should_evaluate = False

    def on_prediction_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Leave the evaluation."""
        if self._requests.ask():
            control.should_training_stop = True
            raise StoppedInEvaluation

    def on_epoch_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """The end was no end of an epoch: what is due there is not due."""
        if self._requests.agreed:
            control.should_evaluate = control.should_save = control.should_log = False


def owes_evaluation(args: TrainingArguments, state: TrainerState) -> bool:
    """Whether an evaluation was due after the last step, by the rules of the Trainer, and has not been done.

    Args:
        args: of the Trainer.
        state: read from a checkpoint.
    """
    if args.eval_strategy == IntervalStrategy.STEPS:
        last = state.global_step >= state.max_steps
        due = (last or state.global_step % state.eval_steps == 0) and args.eval_delay <= state.global_step
    else:
        at_end = state.epoch is not None and float(state.epoch).is_integer()
        due = args.eval_strategy == IntervalStrategy.EPOCH and at_end and args.eval_delay <= (state.epoch or 0)
    logged = (entry for entry in state.log_history if entry["step"] == state.global_step)
    return due and not any(name.startswith("eval_") for entry in logged for name in entry)


def saved_step(checkpoint: Path) -> int:
    """After which step it was saved, whatever its folder is called."""
    return TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME)).global_step


def find_best(state: TrainerState, resumed_from: Path | None) -> None:
    """Let a state that was read from a checkpoint know the best one beside it, though their folder has moved since.

    Args:
        state: whose best checkpoint the Trainer forgets if it is not where it was.
        resumed_from: the checkpoint, None for a run from the beginning.
    """
    if resumed_from is None or not state.best_global_step or state.best_model_checkpoint is not None:
        return
    beside = resumed_from.with_name(f"{checkpoints.PREFIX}{state.best_global_step}")
    if beside.is_dir():
        state.best_model_checkpoint = str(beside)


def _is_of_collective(error: BaseException) -> bool:
    """Whether it was raised because the ranks cannot talk to each other any more."""
    *_, (innermost, _) = traceback.walk_tb(error.__traceback__)
    return innermost.f_globals.get("__name__", "").startswith("torch.distributed")


def describe(last_saved: Path | None) -> str:
    """The newest checkpoint, as the middle of a sentence."""
    return f"the last good checkpoint is {last_saved}" if last_saved else "there is no good checkpoint"
