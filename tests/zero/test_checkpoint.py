"""A run that was saved, ended and resumed equals one that was not, bit for bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.cases import launch_cases
from tests.zero.checkpoint_ranks import AFTER, BEFORE, SCENARIOS

STAGES = (1, 2, 3)
SCRIPT = "tests/zero/checkpoint_ranks.py"


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("checkpoint")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AGSEL_TEST_CHECKPOINTS", str(folder))
        before = launch_cases(SCRIPT, folder / "a", *BEFORE)
        after = launch_cases(SCRIPT, folder / "b", *AFTER)
    return [one | other for one, other in zip(before, after, strict=True)]


@pytest.mark.parametrize("run", SCENARIOS)
@pytest.mark.parametrize("action", ["saved", "resumed"])
def test_continued_equals_uninterrupted(ranks: list[dict[str, Any]], run: str, action: str) -> None:
    for rank in ranks:
        expected, actual = rank[f"uninterrupted-{run}"], rank[f"{action}-{run}"]
        for key in ("losses", "selected", "modes", "counts"):
            assert actual[key] == expected[key], key
        for name, weights in expected["weights"].items():
            assert torch.equal(actual["weights"][name], weights), name
        for block, tensors in expected["states"].items():
            assert all(map(torch.equal, actual["states"][block], tensors)), block


@pytest.mark.parametrize("run", SCENARIOS)
def test_the_save_was_hard(ranks: list[dict[str, Any]], run: str) -> None:
    """At the save some blocks were evicted, and a fresh run had planned others than the saved one."""
    at_save, resumed = ranks[0][f"saved-{run}"]["at save"], ranks[0][f"resumed-{run}"]
    assert len(at_save["resident"]) < len(at_save["counts"])
    assert len(resumed["resident after load"]) < len(at_save["counts"])
    assert at_save["planned"].trainable != resumed["planned before load"].trainable
    assert set(SCENARIOS[run].policy().kinds_of_steps) <= set(resumed["modes"])
    assert resumed["client state"] == 42


@pytest.mark.parametrize("run", [run for run in SCENARIOS if run.startswith(("adagradselect", "elements"))])
def test_a_block_had_never_been_selected_at_the_save(ranks: list[dict[str, Any]], run: str) -> None:
    at_save = ranks[0][f"saved-{run}"]["at save"]
    assert 0 in at_save["counts"].values()
    assert at_save["planned"].kind == ranks[0][f"resumed-{run}"]["planned before load"].kind == "exploit"


@pytest.mark.parametrize("stage", STAGES)
def test_a_checkpoint_over_other_blocks_is_refused(ranks: list[dict[str, Any]], stage: int) -> None:
    for rank in ranks:
        assert "the saved selection is over 4 blocks (layers.0 ...), this run's over 7" in rank[f"other_blocks-{stage}"]


@pytest.mark.parametrize("stage", STAGES)
def test_a_checkpoint_of_other_elements_is_refused(ranks: list[dict[str, Any]], stage: int) -> None:
    for rank in ranks:
        assert "elements by number and checksum: use the mask of the saved run" in rank[f"other_elements-{stage}"]


@pytest.mark.parametrize("stage", STAGES)
def test_loading_the_weights_alone_leaves_the_selection_as_it_is(ranks: list[dict[str, Any]], stage: int) -> None:
    for rank in ranks:
        run = rank[f"warm_start-{stage}"]
        assert any(run["before"].values())
        assert run["after"] == run["before"]
        assert run["steps"] == 5
