"""A run in TensorBoard: curves in groups, pictures of the selection, settings beside results, and texts."""

from __future__ import annotations

import logging
import math
import re
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import Summary, hparams
from transformers import TrainerControl, TrainerState, TrainingArguments
from transformers.integrations import TensorBoardCallback

from agsel.errors import one_line
from agsel.monitor import LAYOUT, NORM, SelectionHistory, pictures, tag_of

logger = logging.getLogger("agsel")

SECONDS_BETWEEN_PICTURES = 60.0
SHARE_OF_PICTURES = 0.005
"""Most of the time of a run that is spent on them."""
PICTURES = {
    "selection/trained_blocks": pictures.selection_map,
    "selection/gradient_norms": pictures.norm_map,
    "selection/counts": pictures.count_bars,
}
FINAL = r"train/loss|eval/loss|eval/\w+_accuracy|speed/tokens_per_second|speed/ms_per_step|memory/peak_gb"
"""What TensorBoard shows beside the settings of runs: a pattern of tags."""


class Curves(TensorBoardCallback):
    """In place of the Trainer's own callback: a second writer in the same folder would hide one of the two.

    Args:
        history: gives the history of the selection.
        settings: numbers and words by which runs are compared.
        texts: to read there, by title.
    """

    tb_writer: Any

    def __init__(self, history: Callable[[], SelectionHistory]) -> None:
        super().__init__()
        self.settings: dict[str, Any] = {}
        self.texts: dict[str, str] = {}
        self._history = history
        self._next_pictures = time.monotonic() + SECONDS_BETWEEN_PICTURES
        self._last: dict[str, float] = {}
        self._steps_written = 0
        self._disk_has_failed = False

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Open the file, and write what is known before the first step."""
        with self._disk_may_fail():
            self._begin(args, state, control, **kwargs)

    def _begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.global_step and state.is_world_process_zero and self.tb_writer is None and self.logging_dir:
            # Steps to come may be in the folder, by a process that was killed: TensorBoard is to show them once.
            self.tb_writer = SummaryWriter(self.logging_dir, purge_step=state.global_step + 1)
        super().on_train_begin(args, state, control, **kwargs)
        if self.tb_writer is None:
            return
        self._steps_written = len(self._history().steps)  # by the process that this one goes on from
        self.tb_writer.add_custom_scalars(LAYOUT)
        for title, text in self.texts.items():
            self.tb_writer.add_text(title, f"```\n{text}\n```")

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Mapping[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Write the numbers, and now and then the pictures. An evaluation may come before or after training."""
        with self._disk_may_fail():
            if self.tb_writer is None and not self._disk_has_failed:
                super().on_log(args, state, control, logs={}, **kwargs)  # opens the file, on the first rank
            if self.tb_writer is not None:
                self._write(state, logs or {})

    def _write(self, state: TrainerState, logs: Mapping[str, float]) -> None:
        numbers = {tag_of(name): value for name, value in logs.items() if isinstance(value, int | float)}
        for tag, value in numbers.items():
            if not tag.startswith(NORM):
                self.tb_writer.add_scalar(tag, value, state.global_step)
        self._write_norms()
        self._last |= numbers
        if time.monotonic() >= self._next_pictures:
            self._draw(state.global_step)
        self.tb_writer.flush()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Write the last pictures, and the results beside the settings."""
        if self.tb_writer is None:
            return
        with self._disk_may_fail():
            self._end(args, state, control, **kwargs)

    def _end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._draw(state.global_step)
        found = {tag: value for tag, value in self._last.items() if re.fullmatch(FINAL, tag)}
        settings = {
            name: value if isinstance(value, int | float) else str(value) for name, value in self.settings.items()
        }
        for summary in hparams(settings, found):
            self.tb_writer.file_writer.add_summary(summary)
        super().on_train_end(args, state, control, **kwargs)

    @contextmanager
    def _disk_may_fail(self) -> Iterator[None]:
        """No run ends for its curves."""
        try:
            yield
        except OSError as error:
            logger.warning("no more curves for TensorBoard: %s", one_line(error))
            self.tb_writer, self._disk_has_failed = None, True

    def _write_norms(self) -> None:
        """Of every step since the last time, not only of those that are logged; a step at once, which is quicker."""
        history = self._history()
        for step, norms in zip(history.steps[self._steps_written :], history.norms[self._steps_written :], strict=True):
            measured = [
                Summary.Value(tag=f"{NORM}{history.blocks[index]}", simple_value=norms[index])
                for index in np.flatnonzero(np.isfinite(norms))
            ]
            self.tb_writer.file_writer.add_summary(Summary(value=measured), step)
        self._steps_written = len(history.steps)

    def _draw(self, step: int) -> None:
        history, began = self._history(), time.monotonic()
        if not history.steps:
            return
        try:
            for tag, picture in PICTURES.items():
                self.tb_writer.add_figure(tag, picture(history), step, close=False)
        except Exception as error:  # no run ends for a picture
            logger.warning("no more pictures for TensorBoard: %s: %s", type(error).__name__, one_line(error))
            self._next_pictures = math.inf
            return
        now = time.monotonic()
        self._next_pictures = now + max(SECONDS_BETWEEN_PICTURES, (now - began) / SHARE_OF_PICTURES)
