"""A run that was saved, ended and resumed equals one that was not, bit for bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.cases import launch_cases

STAGES = (1, 2, 3)
SCRIPT = "tests/zero/checkpoint_ranks.py"


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("checkpoint")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AGSEL_TEST_CHECKPOINTS", str(folder))
        before = launch_cases(
            SCRIPT, folder / "a", *(f"{case}-{s}" for s in STAGES for case in ("uninterrupted", "saved"))
        )
        after = launch_cases(
            SCRIPT, folder / "b", *(f"{case}-{s}" for s in STAGES for case in ("resumed", "other_blocks", "warm_start"))
        )
    return [one | other for one, other in zip(before, after, strict=True)]


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("run", ["saved", "resumed"])
def test_continued_equals_uninterrupted(ranks: list[dict[str, Any]], stage: int, run: str) -> None:
    for rank in ranks:
        expected, actual = rank[f"uninterrupted-{stage}"], rank[f"{run}-{stage}"]
        for key in ("losses", "selected", "modes", "counts"):
            assert actual[key] == expected[key], key
        for name, weights in expected["weights"].items():
            assert torch.equal(actual["weights"][name], weights), name
        for block, tensors in expected["states"].items():
            assert all(map(torch.equal, actual["states"][block], tensors)), block


@pytest.mark.parametrize("stage", STAGES)
def test_the_save_was_hard(ranks: list[dict[str, Any]], stage: int) -> None:
    """At the save a block had never been selected, others were evicted; exploring and exploiting steps follow."""
    at_save = ranks[0][f"saved-{stage}"]["at save"]
    assert 0 in at_save["counts"].values()
    assert len(at_save["resident"]) < len(at_save["counts"])
    assert {"explore", "exploit"} <= set(ranks[0][f"resumed-{stage}"]["modes"])
    before_load = ranks[0][f"resumed-{stage}"]["planned before load"]
    assert at_save["planned"].kind == before_load.kind == "exploit"
    assert at_save["planned"].trainable != before_load.trainable
    assert ranks[0][f"resumed-{stage}"]["client state"] == 42
    assert len(ranks[0][f"resumed-{stage}"]["resident after load"]) < len(at_save["counts"])


@pytest.mark.parametrize("stage", STAGES)
def test_a_checkpoint_over_other_blocks_is_refused(ranks: list[dict[str, Any]], stage: int) -> None:
    for rank in ranks:
        assert "the saved selection is over 4 blocks (layers.0 ...), this run's over 7" in rank[f"other_blocks-{stage}"]


@pytest.mark.parametrize("stage", STAGES)
def test_loading_the_weights_alone_leaves_the_selection_as_it_is(ranks: list[dict[str, Any]], stage: int) -> None:
    for rank in ranks:
        run = rank[f"warm_start-{stage}"]
        assert any(run["before"].values())
        assert run["after"] == run["before"]
        assert run["steps"] == 5
