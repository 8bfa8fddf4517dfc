"""What a run shows while it trains: the status line, TensorBoard scalars, and `selection.json` at its end."""

import json
import time
from pathlib import Path
from typing import Any

from tqdm import tqdm
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations import TensorBoardCallback

from agsel.monitor import block_ranges, has_results_of_tasks, selection_scalars, status_line
from agsel.zero import Selection, StepReport


class SelectionCallback(TrainerCallback):
    """Prints the status line, reports to TensorBoard, writes `selection.json`.

    TensorBoard scalars go where the Trainer's own go, if it has a `TensorBoardCallback`.

    Attributes:
        selection: of the run, once agsel is attached to its engine.
    """

    def __init__(self, trainer: Trainer) -> None:
        self.selection: Selection | None = None
        self._trainer = trainer
        self._modes: list[str] = []
        self._clock = _TokenClock()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Remember how the step chose its blocks."""
        if state.is_world_process_zero:
            self._modes.append(self._last_step().mode)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Print the status line, and after training steps write the scalars."""
        numbers = dict(logs or {})
        is_shown = numbers.keys() & {"loss", "eval_loss"} or has_results_of_tasks(numbers)
        if not state.is_world_process_zero or not is_shown:
            return
        if "loss" not in numbers:
            tqdm.write(status_line(state.global_step, state.max_steps, numbers))
            return
        numbers |= self._clock.tokens_per_second(numbers.get("num_tokens"))
        tqdm.write(status_line(state.global_step, state.max_steps, numbers, self._choice()))
        self._write_scalars(state.global_step)
        self._modes.clear()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Write how often each block was trained to `<output_dir>/selection.json`; say what sanity checks cost."""
        if state.is_world_process_zero and self.selection is not None:
            policy = self.selection.policy
            report = policy.settings() | {
                "steps": policy.step,
                "blocks": list(self.selection.blocks),
                "counts": self.selection.counts,
            }
            Path(args.output_dir, "selection.json").write_text(json.dumps(report, indent=2) + "\n")
            if self.selection.sanity is not None:
                tqdm.write(str(self.selection.sanity))

    def _last_step(self) -> StepReport:
        assert self.selection is not None
        assert self.selection.last is not None
        return self.selection.last

    def _choice(self) -> str:
        assert self.selection is not None
        last, epsilon = self._last_step(), self.selection.policy.epsilon
        mode = last.mode if epsilon is None else f"{last.mode} ε {epsilon:.2f}"
        return f"{mode}  {block_ranges(last.selected)}"

    def _write_scalars(self, step: int) -> None:
        writer = self._tensorboard_writer()
        if writer is None or self.selection is None:
            return
        last = self._last_step()
        scalars = selection_scalars(
            counts=self.selection.counts,
            selected=last.selected,
            norms=last.norms,
            explored=self._modes.count("explore") / max(1, len(self._modes)),
            epsilon=self.selection.policy.epsilon,
        )
        for tag, value in scalars.items():
            writer.add_scalar(tag, value, step)

    def _tensorboard_writer(self) -> Any:
        """The writer of the Trainer's own scalars: a second one in the same folder would hide one of the two."""
        callbacks = self._trainer.callback_handler.callbacks
        return next((item.tb_writer for item in callbacks if isinstance(item, TensorBoardCallback)), None)


class _TokenClock:
    """Tokens per second between status lines, pauses for evaluation included, from the running total that TRL logs."""

    def __init__(self) -> None:
        self._time = 0.0
        self._tokens = 0.0

    def tokens_per_second(self, tokens: float | None) -> dict[str, float]:
        """Empty on the first call and for trainers that do not count tokens."""
        if tokens is None:
            return {}
        now = time.perf_counter()
        seconds, new_tokens, first = now - self._time, tokens - self._tokens, self._tokens == 0
        self._time, self._tokens = now, tokens
        return {} if first else {"tokens_per_second": new_tokens / seconds}
