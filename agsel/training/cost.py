"""What a run cost: its time, its memory, its parameters; `result.json`, after which a run writes but its report."""

import json
import statistics
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from agsel.replacing import replace_file
from agsel.training.best import exported_step
from agsel.training.configuration import Configuration
from agsel.zero.consensus import gather
from agsel.zero.parameters import block_infos, global_numel

OF_STEPS_DONE = ("timed_steps", "train_seconds", "step_seconds", "peak_bytes", "peak_reserved_bytes")
"""What a result tells of the steps that the process has done which wrote it."""


class CostCallback(TrainerCallback):
    """Reads the clock of this process, and counts parameters before blocks are frozen for a step.

    Attributes:
        parameters: of the model, adapters included.
        trainable_parameters: those of the blocks that take part.
    """

    def __init__(self, trainer: Trainer, configuration: Configuration) -> None:
        self.parameters = global_numel(trainer.model.parameters())
        self.trainable_parameters = sum(info.numel for info in block_infos(configuration.blocks_of(trainer.model)))
        self._durations: list[float] = []

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """The first step begins."""
        self._durations = []
        self._began = self._border = time.perf_counter()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """A step ends and the next one begins, to which the reading of its loss counts: that waits for the device."""
        now = time.perf_counter()
        self._durations.append(now - self._border)
        self._border = now

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """An evaluation is no part of a step."""
        self._border = time.perf_counter()

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Nor is a checkpoint."""
        self._border = time.perf_counter()

    def describe(self, state: TrainerState) -> dict[str, Any]:
        """Steps, seconds and parameters; times are those of the steps that this process has done, None without one.

        Training ends with the last step, or the evaluation and checkpoint that belong to it.
        """
        durations = self._durations
        return {
            "steps": state.global_step,
            "timed_steps": len(durations),
            "train_seconds": self._border - self._began if durations else None,
            "step_seconds": statistics.median(durations) if durations else None,
            "parameters": self.parameters,
            "trainable_parameters": self.trainable_parameters,
        }


def describe_result(trainer: Trainer, cost: CostCallback, group: Any) -> dict[str, Any]:
    """What the run cost, its last loss, and the evaluation loss of the model it exports. Every rank must call it.

    Args:
        trainer: that has trained.
        cost: its callback.
        group: process group of all ranks, on the host.
    """
    peaks = gather(peak_bytes(trainer.args), group)
    result = cost.describe(trainer.state)
    for name in ("peak_bytes", "peak_reserved_bytes"):
        result[name] = max((peak[name] for peak in peaks if peak), default=None)
    result["exported_step"] = exported_step(trainer)
    result["loss"] = _last(trainer, "loss", trainer.state.global_step)
    result["eval_loss"] = _last(trainer, "eval_loss", result["exported_step"])
    return result


def _last(trainer: Trainer, name: str, step: int) -> float | None:
    """What was logged by a step at last."""
    logged = reversed(trainer.state.log_history)
    return next((entry[name] for entry in logged if name in entry and entry["step"] <= step), None)


def keep_known_cost(result: Mapping[str, Any], path: Path) -> Mapping[str, Any]:
    """A result with the times and peaks of an earlier file, if that is of the same steps and this process did none."""
    try:
        earlier = json.loads(path.read_text(encoding="utf-8"))
        if result["timed_steps"] == 0 and earlier["steps"] == result["steps"]:
            return {**result, **{name: earlier[name] for name in OF_STEPS_DONE}}
    except (OSError, ValueError, KeyError, TypeError):  # there is none
        pass
    return result


def write_result(result: Mapping[str, Any], path: Path) -> None:
    """Write it complete or not at all."""
    replace_file(path, json.dumps(result, indent=2) + "\n")


def peak_bytes(training: TrainingArguments) -> dict[str, int]:
    """Most device memory that this process has used since its start and that PyTorch has kept for it; none on the CPU.

    What it has kept is what other processes on the device lack.
    """
    if training.use_cpu:
        return {}
    return {
        "peak_bytes": torch.cuda.max_memory_allocated(training.device),
        "peak_reserved_bytes": torch.cuda.max_memory_reserved(training.device),
    }
