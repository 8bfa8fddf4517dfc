"""Step times from a trace: against sums by hand."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest

from agsel.planning.duration import HOOK, PROVIDED, STOCK_GRADIENT, Speeds, calibrated, host_speed, step_time
from agsel.planning.forecast import Forecast
from agsel.planning.memory import Planner, meta_model
from agsel.planning.rehearsal import Trace, Workload, ZeroSettings
from agsel.planning.rehearsal.trace import Collective
from agsel.planning.shapes import MODEL_SHAPES
from agsel.planning.traffic import Cluster

SPEEDS = Speeds(flops=1e12, memory=1e9, link=1e9, network=1e8, host=1e9)
TWO = Cluster(ranks=2, ranks_per_host=2)
HOPS = 11.9e-6
"""Seconds of a gather of a few bytes on two GPUs."""


def trace() -> Trace:
    """Forward 1 s of products and 2 s of a pass over memory, backward 4 s; 100 MB gathered, 400 MB scattered in two."""
    return Trace(
        kernels={
            "forward": Counter({(10**11, 10**6): 10, (10**6, 2 * 10**9): 1}),
            "backward": Counter({(4 * 10**12, 10**6): 1}),
        },
        collectives=Counter(
            {
                Collective("all-gather", 100_000_000, "forward"): 1,
                Collective("reduce-scatter", 200_000_000, "backward"): 2,
                Collective("all-gather", 20_000_000, "step"): 1,
            }
        ),
        updated=10**8,
    )


def test_collectives_hide_but_for_one() -> None:
    found = step_time(trace(), TWO, SPEEDS)
    assert found.forward.gpu == pytest.approx(3)
    assert found.forward.total == pytest.approx(3 + 0.05 + HOPS)
    assert found.backward.sending == pytest.approx(2 * (0.1 + HOPS))
    assert found.backward.total == pytest.approx(4 + 0.1 + HOPS)
    assert found.step.gpu == pytest.approx(46 * 10**8 / 2 / 1e9)
    assert found.step.total == pytest.approx(2.3 + 0.01 + HOPS)
    assert found.total == pytest.approx(3.05 + 4.1 + 2.31 + 3 * HOPS)


def test_what_is_sent_for_longer_than_computed_shows() -> None:
    slow = step_time(trace(), TWO, replace(SPEEDS, link=1e7))
    assert slow.forward.total == pytest.approx(3 + 5 + HOPS), "one gather alone hides behind nothing"
    assert slow.backward.total == pytest.approx(20 + 2 * HOPS)


def test_python_may_take_longer_than_the_gpu() -> None:
    busy = replace(trace(), gradients=20_000, hooked=4000, provided=6000, stock=True)
    hooks = (4000 * HOOK + 6000 * PROVIDED) / 2
    found = step_time(busy, TWO, SPEEDS)
    assert found.forward.python == pytest.approx(hooks + 11 * 60e-6 + 0.3e-3)
    assert found.backward.python == pytest.approx(20_000 * STOCK_GRADIENT + hooks + 60e-6 + 2 * 0.3e-3)
    assert found.backward.total == pytest.approx(found.backward.python + 0.1 + HOPS)


def test_micro_batches_repeat_forward_and_backward_only() -> None:
    once, thrice = (step_time(trace(), TWO, SPEEDS, accumulation=number) for number in (1, 3))
    assert thrice.forward.total == pytest.approx(9 + 0.05 + HOPS)
    assert thrice.backward.gpu == pytest.approx(12)
    assert thrice.step == once.step


def test_states_hide_behind_what_is_left_of_the_step() -> None:
    beside = 3.05 + 4.1 + 2 * HOPS
    assert step_time(trace(), TWO, SPEEDS, moved=7e9).waiting == 0
    assert step_time(trace(), TWO, SPEEDS, moved=9e9).waiting == pytest.approx(9 - beside)
    late = step_time(trace(), TWO, SPEEDS, moved=7e9, explores=True)
    assert late.waiting == pytest.approx(7 - 2 / 3 * (4.1 + HOPS))


def test_the_slowness_of_a_machine_is_found_from_one_step() -> None:
    slower = replace(SPEEDS, slowness=1.7)
    measured = step_time(trace(), TWO, slower).total
    assert measured == pytest.approx(1.7 * 9.3 + 0.16 + 3 * HOPS)
    assert calibrated(trace(), TWO, SPEEDS, measured).slowness == pytest.approx(1.7)


def test_gpus_of_a_host_share_the_way_to_its_memory() -> None:
    assert [host_speed(ranks) / 1e9 for ranks in (1, 2, 4, 8)] == [51, 37, 22, 22]


def forecast(speeds: Speeds = SPEEDS) -> Forecast:
    work = Workload(zero=ZeroSettings(stage=3), ranks=16, micro_batch=2, sequence=64)
    return Forecast(Planner(meta_model(MODEL_SHAPES["tiny"]()), work), 2, ("explore", "exploit", "full"), speeds)


def test_a_forecast_divides_states_among_all_gpus() -> None:
    layers = 6 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 128 + 2 * 64)
    found = forecast()
    for ranks in (16, 64):
        moved = found.step("exploit", Cluster(ranks=ranks, ranks_per_host=8)).moved
        assert moved == pytest.approx(1 / 3 * 2 / 3 * 12 * layers / ranks, rel=1e-3), "a third, of it a third stays"
    assert found.step("full", TWO).moved == 0
    assert found.states_small_from(1e5) == pytest.approx(12 * layers / 5e3, abs=1)


def test_where_more_gpus_stop_paying() -> None:
    class Known(Forecast):
        def saving(self, cluster: Cluster) -> float:
            return 1.0 / cluster.hosts

    work = Workload(zero=ZeroSettings(stage=2), ranks=8, micro_batch=2, sequence=64)
    known = Known(Planner(meta_model(MODEL_SHAPES["tiny"]()), work), 2, ("exploit", "full"), SPEEDS)
    assert known.pays_up_to(8) == 128, "16 hosts: 6 %, 32: 3 %"
    times = [known.step(kind, TWO).time.total for kind in ("exploit", "full")]
    assert Forecast.saving(known, TWO) == pytest.approx(1 - times[0] / times[1])
