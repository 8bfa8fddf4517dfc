"""What is measured while a run goes on, with a clock and a device that the test moves."""

from __future__ import annotations

import time
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from transformers import MixtralConfig

from agsel.planning.memory import meta_model
from agsel.training import gauges
from agsel.training.gauges import Gauges
from agsel.zero import waits
from agsel.zero.waits import Waits
from tests.tiny import tiny_model

CPU = SimpleNamespace(device=torch.device("cpu"), world_size=2, max_length=16)


class Device:
    """Does what it was given when `done` is raised; each event lies 10 ms after the one before."""

    def __init__(self) -> None:
        self.events = 0
        self.done = 0

    def record(self) -> Event:
        self.events += 1
        return Event(self, self.events)


class Event:
    def __init__(self, device: Device, number: int) -> None:
        self.device, self.number = device, number

    def query(self) -> bool:
        return self.number <= self.device.done

    def elapsed_time(self, end: Event) -> float:
        assert end.query(), "CUDA refuses it before"
        return 10.0 * (end.number - self.number)


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Device:
    device = Device()
    monkeypatch.setattr(waits, "_now", device.record)
    return device


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    clock = SimpleNamespace(now=100.0)
    monkeypatch.setattr(time, "perf_counter", lambda: clock.now)
    return clock


def selection_that_moved(moved: int) -> Any:
    return SimpleNamespace(residency=SimpleNamespace(moved_bytes=moved))


def test_waits_are_counted_once_when_the_device_has_done_them(device: Device) -> None:
    waited: list[str] = []
    residency: Any = SimpleNamespace(wait_for=waited.append)
    counted = Waits(residency)
    for partition in ("a", "b", "c"):
        residency.wait_for(partition)
    assert (waited, counted.milliseconds()) == (["a", "b", "c"], 0)
    device.done = 3  # the second wait has only begun
    assert counted.milliseconds() == 10
    device.done = 6
    assert (counted.milliseconds(), counted.milliseconds()) == (20, 0)


def test_a_wait_that_ends_while_the_others_are_looked_at_counts_later(device: Device) -> None:
    residency: Any = SimpleNamespace(wait_for=lambda _: None)
    counted = Waits(residency)
    residency.wait_for("a")
    residency.wait_for("b")
    query = Event.query

    def query_while_it_goes_on(event: Event) -> bool:
        ended = query(event)
        device.done = 4
        return ended

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Event, "query", query_while_it_goes_on)
        first = counted.milliseconds()
    assert first + counted.milliseconds() == 20


def test_times_are_means_over_steps_without_pauses(clock: SimpleNamespace) -> None:
    selection = selection_that_moved(0)
    measured = Gauges(selection, CPU, tiny_model())  # type: ignore[arg-type]
    for data, computing in ((1.0, 2.0), (3.0, 4.0)):
        clock.now += data
        measured.step_begins()
        clock.now += computing
        measured.step_ends()
    clock.now += 0.5  # the loss is read, for which the host waits
    selection.residency.moved_bytes = 4_000_000_000
    numbers = measured.read(1000)
    assert (numbers["speed/ms_per_step"], numbers["speed/data_ms"]) == (5250, 2000)
    assert numbers["memory/moved_gb_per_step"] == 2
    assert "speed/tokens_per_second" not in numbers, "nobody knows how many there were before"
    clock.now += 60
    measured.pause_ends()
    clock.now += 2
    measured.step_begins()
    measured.step_ends()
    numbers = measured.read(1300)
    assert (numbers["speed/ms_per_step"], numbers["speed/tokens_per_second"]) == (2000, 150)
    assert numbers["memory/moved_gb_per_step"] == 0


def test_utilisation_is_of_all_ranks_and_only_of_models_that_tell_their_size(
    clock: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gauges, "_peak_flops", lambda _: 1e9)
    monkeypatch.setattr(gauges, "flops_per_token", lambda *_: 1e6)
    measured = Gauges(selection_that_moved(0), CPU, tiny_model())  # type: ignore[arg-type]
    measured.read(0)
    clock.now += 2
    assert measured.read(1000)["speed/mfu"] == pytest.approx(500 * 1e6 / 2e9)
    monkeypatch.undo()
    assert gauges._flops_per_token(nn.Linear(2, 2), CPU) is None  # type: ignore[arg-type]


def test_no_arithmetic_is_told_of_experts() -> None:
    """Every token passes two of four; and their weights are no linear layers of PyTorch's."""
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    config = MixtralConfig(**sizes, num_key_value_heads=2, num_local_experts=4, vocab_size=64)
    arguments: Any = SimpleNamespace(max_length=16)
    assert gauges._flops_per_token(meta_model(config), arguments) is None
    assert gauges._flops_per_token(tiny_model(), arguments)
