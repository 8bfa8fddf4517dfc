"""What goes wrong on one rank is seen by all: nobody steps, nobody hangs, the error names the cause."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch

from agsel.zero.consensus import dissent
from tests.cases import launch_cases
from tests.distributed import RANKS, launch

STAGES = (1, 2, 3)
NAMED = "checksums by rank: " if RANKS == 2 else "not like the others: rank 1)"
"""Of two ranks that differ, nobody knows which is right."""


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return launch_cases("tests/zero/faults_ranks.py", tmp_path_factory.mktemp("faults"))


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize(
    ("case", "scale_ratio"), [("nan", 1.0), ("inf", 1.0), ("nan-loss", 1.0), ("inf-loss", 1.0), ("overflow", 0.5)]
)
def test_no_rank_steps_on_a_non_finite_gradient(
    ranks: list[dict[str, Any]], stage: int, case: str, scale_ratio: float
) -> None:
    for rank in ranks:
        run = rank[f"{case}-{stage}"]
        assert run["unchanged"]
        assert run["mode"] == "skipped"
        assert run["skipped"] == 1
        assert run["scale ratio"] == scale_ratio
        assert run["steps"] == 8


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("case", ["nan", "inf", "nan-loss", "inf-loss"])
def test_the_run_goes_on_as_if_the_step_had_not_been(ranks: list[dict[str, Any]], stage: int, case: str) -> None:
    run = ranks[0][f"{case}-{stage}"]
    assert all(torch.equal(run["after"][name], weights) for name, weights in run["clean"].items())


@pytest.mark.parametrize("stage", [2, 3])
def test_nothing_is_chosen_by_a_first_micro_batch_that_is_not_finite(ranks: list[dict[str, Any]], stage: int) -> None:
    for rank in ranks:
        run = rank[f"early-{stage}"]
        assert run["unchanged"]
        assert (run["mode"], run["skipped"], run["steps"]) == ("skipped", 1, 8)
        assert all(torch.equal(run["after"][name], weights) for name, weights in run["clean"].items())


@pytest.mark.parametrize("stage", STAGES)
def test_a_run_that_is_never_finite_stops(ranks: list[dict[str, Any]], stage: int) -> None:
    for rank in ranks:
        assert "3 steps in a row had a non-finite gradient (max_skipped_steps)" in rank[f"never-finite-{stage}"]


@pytest.mark.parametrize("stage", STAGES)
def test_ranks_that_disagree_stop(ranks: list[dict[str, Any]], stage: int) -> None:
    for rank in ranks:
        assert f"ranks disagree on the selection state at step 4 ({NAMED}" in rank[f"mutated-{stage}"]


def test_ranks_against_the_majority_are_named() -> None:
    assert dissent([7, 3, 7, 7, 1]) == "not like the others: rank 1, 4"
    assert dissent([7, 3]) == "checksums by rank: 7, 3"
    assert dissent([-1, 3, 3, 10]) == "checksums by rank: ffffffffffffffff, 3, 3, a"


def test_a_real_run_whose_ranks_disagree_ends_in_time() -> None:
    started = time.monotonic()
    result = launch("tests/zero/disagree.py", timeout=60)
    assert result.returncode != 0
    assert result.stdout.count("RanksDisagreeError: ranks disagree on the selection state at step 3") == RANKS
    assert time.monotonic() - started < 60


def test_different_seeds_are_refused_by_name(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        assert "the ranks have different settings: seed is 0 and 1" in rank["different-seeds"]


@pytest.mark.parametrize("kind", ["elsewhere", "fewer", "another"])
def test_different_masks_are_refused_in_one_line(ranks: list[dict[str, Any]], kind: str) -> None:
    for rank in ranks:
        message = rank["different-masks"][kind]
        assert message.startswith("the ranks have different masks: ")
        assert "\n" not in message


@pytest.mark.parametrize("stage", STAGES)
def test_elements_that_differ_between_engines_are_refused_in_one_line(ranks: list[dict[str, Any]], stage: int) -> None:
    for rank in ranks:
        message = rank[f"changed-mask-{stage}"]
        assert message.startswith("the ranks have different settings: trained elements is '")
        assert "\n" not in message


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("case", ["reentrant", "not-reentrant"])
def test_gradient_checkpointing_changes_nothing(ranks: list[dict[str, Any]], stage: int, case: str) -> None:
    run, plain = ranks[0][f"{case}-{stage}"], ranks[0][f"plain-{stage}"]
    assert run["losses"] == pytest.approx(plain["losses"], rel=0, abs=1e-6)
    for name, weights in plain["weights"].items():
        torch.testing.assert_close(run["weights"][name], weights, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("stage", STAGES)
def test_blocks_cut_off_from_the_loss_are_named(ranks: list[dict[str, Any]], stage: int) -> None:
    for rank in ranks:
        assert "no gradient reached" in rank[f"cut-off-{stage}"]
        assert "use_reentrant=False" in rank[f"cut-off-{stage}"]
