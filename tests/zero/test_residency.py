"""No state is read before its copy landed, or after it left: stale copies are NaN, and nothing changes."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch

from tests.cases import Results, launch_cases
from tests.zero.residency_ranks import AGAIN, CASES
from tests.zero.rules import RULES


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[Results]:
    return launch_cases("tests/zero/residency_ranks.py", tmp_path_factory.mktemp("residency"))


@pytest.mark.parametrize(
    ("name", "moving"),
    [(name, moving) for name in CASES for moving in ("moved", "in parts")]
    + [(name, "not pinned") for name in CASES if name.endswith("mixed")],
)
def test_moving_states_changes_nothing(ranks: list[Results], name: str, moving: str) -> None:
    assert_equal_to_kept(ranks, name, moving)


def assert_equal_to_kept(ranks: list[Results], name: str, moving: str) -> None:
    for rank in ranks:
        kept, moved = rank[name]["kept"], rank[name][moving]
        assert all(map(math.isfinite, kept["losses"]))
        assert moved["losses"] == kept["losses"]
        assert moved["selected"] == kept["selected"]
        assert all(torch.equal(kept["weights"][key], moved["weights"][key]) for key in kept["weights"])


@pytest.mark.parametrize("name", [name for name in CASES if name.endswith("new-set-every-step")])
def test_states_are_sent_while_the_step_computes(ranks: list[Results], name: str) -> None:
    """Half of them in the forward, and more if their room is given back; the rest in the backward."""
    for rank in ranks:
        run = rank[name]["in parts"]
        steps = list(zip(*run["leaving"].values(), strict=True))
        assert len(steps) == len(run["selected"])
        for (decided, exchanged), (left, left_exchanged), backward in steps:
            assert left == left_exchanged == pytest.approx(min(decided / 2, exchanged), abs=8)
            assert backward == (0, 0)
        assert any(left for _, (left, _), _ in steps)


@pytest.mark.parametrize("name", CASES)
def test_deepspeed_waits_for_states_on_their_way(ranks: list[Results], name: str) -> None:
    for rank in ranks:
        runs = [run for key, run in rank[name].items() if key != "bytes"]
        assert all(run["reads equal"] and run["refreshed"] for run in runs)


@pytest.mark.parametrize("name", CASES)
def test_a_destroyed_engine_leaves_no_hooks(ranks: list[Results], name: str) -> None:
    for rank in ranks:
        assert rank[name]["moved"]["hooks left"] == 0


@pytest.mark.parametrize("name", AGAIN)
def test_the_model_of_a_destroyed_engine_trains_on(ranks: list[Results], name: str) -> None:
    for rank in ranks:
        run = rank[name]
        assert any(not torch.equal(run["halfway"][key], weight) for key, weight in run["fresh"].items())
        assert all(torch.equal(run["used"][key], weight) for key, weight in run["fresh"].items())


@pytest.mark.parametrize("name", [name for name in CASES if name.endswith(("new-set-every-step", *RULES))])
def test_only_what_changes_is_moved(ranks: list[Results], name: str) -> None:
    """Of a block whose moments start anew, the master alone."""
    for rank in ranks:
        size, run = rank[name]["bytes"], rank[name]["moved"]
        assert rank[name]["kept"]["moved_bytes"] == 0
        exchanged = [set(before) ^ set(after) for before, after in pairwise(run["selected"])]
        assert any(exchanged)
        assert run["moved_bytes"] == sum(size[block] for blocks in exchanged for block in blocks)
