"""agsel on two ranks equals a plain single-process loop; with every block selected it equals stock DeepSpeed."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.cases import launch_cases
from tests.zero.parity_ranks import EARLY, FULL, PARITY, RECOMPUTED
from tests.zero.scenario import Record, Reference

SLOW = ("stage3-checkpointing-over-lora", "stage3-checkpointing-over-dora")
"""Checkpointing changes no bit of `RECOMPUTED`, and other cases at stage 3 over these adapters equal the plain loop."""
PARITIES = [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in PARITY]


@pytest.fixture(scope="module")
def ranks(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    left_out = () if request.config.getoption("--slow") else SLOW
    names = [name for name in (*PARITY, *FULL, *RECOMPUTED) if name not in left_out]
    return launch_cases("tests/zero/parity_ranks.py", tmp_path_factory.mktemp("parity"), *names)


@pytest.fixture(scope="module")
def loss_tolerance() -> float:
    return 1e-6


@pytest.fixture(scope="module")
def references() -> dict[tuple, Record]:
    return {}


@pytest.mark.parametrize("name", PARITIES)
def test_equals_the_plain_loop(
    ranks: list[dict], references: dict[tuple, Record], loss_tolerance: float, name: str
) -> None:
    scenario = PARITY[name]
    policy = scenario.policy()
    key = (
        scenario.accumulation,
        scenario.clip,
        scenario.blocks,
        scenario.tied,
        scenario.adapters,
        scenario.select_from,
        scenario.choose_early,
        str(policy),
    )
    if key not in references:
        references[key] = Reference(scenario).run()
    reference = references[key]
    run: Record = ranks[0][name]
    assert len(run.losses) == scenario.steps >= 12
    assert set(policy.kinds_of_steps) <= set(run.modes)
    assert run.selected == reference.selected
    assert run.modes == reference.modes
    assert run.losses == pytest.approx(reference.losses, rel=0, abs=loss_tolerance)
    assert run.grad_norms == pytest.approx(reference.grad_norms, rel=1e-5)
    assert len({*run.selected}) > 1
    for norms, expected in zip(run.norms, reference.norms, strict=True):
        assert norms == pytest.approx(expected, rel=1e-5, abs=0)


@pytest.mark.parametrize("name", PARITIES)
def test_ranks_choose_alike(ranks: list[dict], name: str) -> None:
    for rank in ranks[1:]:
        assert rank[name].selected == ranks[0][name].selected
        assert rank[name].norms == ranks[0][name].norms


@pytest.mark.parametrize("name", [case for case in PARITIES if PARITY[str(case.values[0])].clip])
def test_clipping_was_active(ranks: list[dict], name: str) -> None:
    assert sum(norm > PARITY[name].clip for norm in ranks[0][name].grad_norms) >= 8


@pytest.mark.parametrize("rule", EARLY)
def test_the_first_micro_batch_chooses_otherwise_than_all(rule: str) -> None:
    early = PARITY[f"stage2-early-{rule}"]
    assert Reference(early).run().selected != Reference(replace(early, choose_early=False)).run().selected


@pytest.mark.parametrize("name", FULL)
def test_all_blocks_selected_equals_stock_deepspeed(ranks: list[dict], name: str) -> None:
    for rank in ranks:
        runs = rank[name]
        assert runs["agsel"]["losses"] == runs["stock"]["losses"]
        for parameter, weights in runs["stock"]["weights"].items():
            assert torch.equal(runs["agsel"]["weights"][parameter], weights), parameter


@pytest.mark.parametrize("name", RECOMPUTED)
def test_checkpointing_over_adapters_changes_no_bit(ranks: list[dict], name: str) -> None:
    for rank in ranks:
        plain, checkpointed = rank[name]["plain"], rank[name]["checkpointed"]
        assert checkpointed["forwards"] > plain["forwards"]
        assert checkpointed["record"] == plain["record"]
        for parameter, weights in plain["weights"].items():
            assert torch.equal(checkpointed["weights"][parameter], weights), parameter
