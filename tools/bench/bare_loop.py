"""A training run that is nothing but the loop over a DeepSpeed engine."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from agsel.errors import UserError
from tools.bench.compared_methods import method_of
from tools.bench.configurations import Configuration
from tools.bench.device import device, synchronize
from tools.bench.random_model import build_model
from tools.bench.stopwatch import Measurement, Settings, Stopwatch

CYCLED_BATCHES = 4


def run_engine(configuration: Configuration, settings: Settings) -> Measurement:
    """Measure the bare loop over a DeepSpeed engine."""
    stopwatch = Stopwatch(configuration, settings)
    start = method_of(configuration).start
    assert start is not None, "launch/train.py builds this one"
    model = build_model(configuration)
    engine, selection = start(model, configuration)
    try:
        stopwatch.begin(model, selection)
        train(engine, random_batches(configuration, model.config.vocab_size), configuration.accumulation, stopwatch)
    finally:
        dismantle(engine)
    assert stopwatch.measurement is not None
    return stopwatch.measurement


def train(engine: Any, batches: list[torch.Tensor], accumulation: int, stopwatch: Stopwatch) -> None:
    """Step until the stopwatch has seen enough.

    Raises:
        UserError: the loss is not finite.
    """
    number = 0
    while not stopwatch.finished:
        for _ in range(accumulation):
            ids = batches[number % len(batches)]
            loss = engine(input_ids=ids, labels=ids).loss
            stopwatch.mark("forward")
            engine.backward(loss)
            stopwatch.mark("backward")
            engine.step()
            stopwatch.mark("step")
            number += 1
        stopwatch.end_of_step()
    if not loss.isfinite():
        raise UserError("the loss is not finite in the end: what was measured is no training")


def dismantle(engine: Any) -> None:
    """Drop all that an engine holds: hooks tie it into cycles through C++, which the garbage collector cannot see."""
    synchronize()
    model, optimizer, selection = engine.module, engine.optimizer, getattr(engine, "selection", None)
    engine.destroy()
    parameters = list(model.parameters())
    owners = [engine, optimizer, *model.modules(), *parameters]
    for owner in owners + ([selection.residency, selection] if selection else []):
        vars(owner).clear()
    for parameter in parameters:
        parameter.data = torch.empty(0, dtype=parameter.dtype, device=parameter.device)


def random_batches(configuration: Configuration, vocabulary: int) -> list[torch.Tensor]:
    """Token ids of this rank: int64 [micro_batch, sequence] each."""
    generator = torch.Generator().manual_seed(1 + dist.get_rank())
    shape = (configuration.micro_batch, configuration.sequence)
    return [torch.randint(vocabulary, shape, generator=generator).to(device()) for _ in range(CYCLED_BATCHES)]
