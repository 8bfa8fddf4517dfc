"""What a run costs while it goes on: time, arithmetic and memory between two logged steps, read on the first rank.

Nothing here makes the host wait for the device: what the device has not done yet is counted with the next logged step.
"""

from __future__ import annotations

import time

import psutil
import torch
from torch import nn
from transformers import TrainingArguments

from agsel.planning.flops import flops_per_token
from agsel.zero import Selection
from agsel.zero.waits import Waits

PEAK_FLOPS = {
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "H800": 989e12,
    "H20": 148e12,
    "B200": 2250e12,
    "A100": 312e12,
    "A800": 312e12,
    "A10G": 70e12,
    "L40S": 362e12,
    "L4": 121e12,
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
}
"""Dense bf16 operations per second by NVIDIA's data sheets, by a part of the device's name; the first that fits."""


class Gauges:
    """Read at every logged step.

    Args:
        selection: of the run.
        arguments: of the Trainer.
        model: that is trained.
    """

    def __init__(self, selection: Selection, arguments: TrainingArguments, model: nn.Module) -> None:
        self._selection, self._arguments = selection, arguments
        self._peak_flops = _peak_flops(arguments)
        self._flops = _flops_per_token(model, arguments)
        self._waits = Waits(selection.residency) if arguments.device.type == "cuda" else None
        self._moved = selection.residency.moved_bytes
        self._tokens: float | None = None
        self._border = time.perf_counter()
        self._forget()

    def step_begins(self) -> None:
        """The rows of the step are there."""
        now = time.perf_counter()
        self._data += now - self._border
        self._border = now

    def step_ends(self) -> None:
        """The optimizer step is done, or at least under way."""
        now = time.perf_counter()
        self._computing += now - self._border
        self._steps += 1
        self._border = now
        if self._waits is not None:
            self._waits.collect()

    def pause_ends(self) -> None:
        """What went on since the step was none: logging, an evaluation, a checkpoint."""
        self._border = time.perf_counter()

    def read(self, tokens: float | None) -> dict[str, float]:
        """Numbers by names that TensorBoard groups; means over the steps since the last reading.

        Call it right after a step: what the host has waited for the device since then, to read the loss, is the step's.

        Args:
            tokens: processed by all ranks since the start of the run, as TRL counts them; None if nobody does.
        """
        self._computing += time.perf_counter() - self._border
        steps, seconds = max(1, self._steps), self._data + self._computing
        numbers = {"speed/ms_per_step": 1000 * seconds / steps, "speed/data_ms": 1000 * self._data / steps}
        if tokens is not None and self._tokens is not None and seconds:
            numbers["speed/tokens_per_second"] = rate = (tokens - self._tokens) / seconds
            if self._peak_flops and self._flops:
                numbers["speed/mfu"] = rate * self._flops / (self._peak_flops * self._arguments.world_size)
        if self._waits is not None:
            numbers["speed/exposed_ms"] = self._waits.milliseconds() / steps
            numbers["memory/peak_gb"] = self.peak_gigabytes()
        numbers["memory/host_gb"] = psutil.Process().memory_info().rss / 1e9
        moved = self._selection.residency.moved_bytes
        numbers["memory/moved_gb_per_step"] = (moved - self._moved) / 1e9 / steps
        self._tokens, self._moved = tokens, moved
        self._forget()
        return numbers

    def peak_gigabytes(self) -> float:
        """Most device memory that this process has used; 0 on the CPU."""
        device = self._arguments.device
        return torch.cuda.max_memory_allocated(device) / 1e9 if device.type == "cuda" else 0.0

    def _forget(self) -> None:
        self._data = self._computing = 0.0
        self._steps = 0


def _flops_per_token(model: nn.Module, arguments: TrainingArguments) -> float | None:
    """None where the model does not tell, as one without a configuration, or with one for pictures beside it.

    Nor is it known of experts, of which every token passes some.
    """
    if any(name.rpartition(".")[2] == "experts" for name, _ in model.named_modules()):
        return None
    try:
        return flops_per_token(model, getattr(arguments, "max_length", None) or 0)
    except AttributeError:
        return None


def _peak_flops(arguments: TrainingArguments) -> float | None:
    """Of a device in bf16; None where it is unknown, or where the run does not compute in 16 bits."""
    if arguments.device.type != "cuda" or not (arguments.bf16 or arguments.fp16):
        return None
    name = torch.cuda.get_device_name(arguments.device)
    return next((flops for part, flops in PEAK_FLOPS.items() if part in name), None)
