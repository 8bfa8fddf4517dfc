"""The rules that the quality study tries, against their formulas; and its plans, in which they stand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from agsel.errors import UserError
from agsel.policies import AdaGradSelect
from tests.distributed import REPOSITORY
from tests.policies.running import BLOCKS, norms_of, run, started
from tools.comparison.plan_file import read_plan
from tools.quality.leads import ChangingFraction, ForgettingCounts, RelativeNorms

PLANS = sorted((REPOSITORY / "tools" / "quality").glob("*-leads.yaml"))


def forgetting(**settings: float) -> ForgettingCounts:
    return ForgettingCounts(fraction=0.25, explore_steps=5, seed=3, **settings)


def test_counts_forget_as_a_sum_with_falling_weights_does() -> None:
    policy = started(forgetting(count_decay=0.8))
    chosen = [blocks for _, blocks in run(policy, 30)]
    weights = 0.8 ** np.arange(29, -1, -1)
    expected = [
        sum(weight for weight, blocks in zip(weights, chosen, strict=True) if i in blocks) for i in range(BLOCKS)
    ]
    assert policy.concentration == pytest.approx([each + 1 for each in expected], rel=1e-12)
    assert len({*chosen}) > 5


def test_counts_that_forget_nothing_are_those_of_adagradselect() -> None:
    plain = started(AdaGradSelect(fraction=0.25, explore_steps=5, seed=3))
    assert run(started(forgetting(count_decay=1.0)), 40) == run(plain, 40)


def test_recent_counts_are_part_of_the_state() -> None:
    policy = started(forgetting(count_decay=0.5))
    run(policy, 12)
    twin = started(forgetting(count_decay=0.5))
    twin.load_state_dict(policy.state_dict())
    assert run(twin, 20) == run(policy, 20)


@pytest.mark.parametrize(("first", "last"), [(0.25, 0.75), (0.75, 0.25), (0.5, 0.5)])
def test_the_fraction_changes_evenly(first: float, last: float) -> None:
    policy = ChangingFraction(fraction=first, fraction_end=last, seed=1)
    policy.complete(epoch_steps=10, run_steps=31)
    numbers = [len(blocks) for _, blocks in run(started(policy), 31)]
    assert numbers == [max(1, int((first + (last - first) * step / 30) * BLOCKS + 1e-9)) for step in range(31)]
    assert policy.started(policy_blocks()).blocks_per_step == max(numbers)


def policy_blocks() -> list:
    return list(started(AdaGradSelect(fraction=0.5, explore_steps=0)).blocks)


def test_norms_are_divided_by_those_of_the_layers_weights(tmp_path: Path) -> None:
    scales = np.linspace(1, 4, BLOCKS)
    weights = {
        f"model.layers.{i}.mlp.{part}.weight": torch.full((2, 8), scale)
        for i, scale in enumerate(scales)
        for part in "ab"
    }
    save_file({**weights, "model.embed_tokens.weight": torch.ones(3, 8)}, tmp_path / "model.safetensors")
    policy = RelativeNorms(fraction=0.25, explore_steps=30, epsilon_end=1.0, norms_of=str(tmp_path))
    for step, (_, blocks) in enumerate(run(started(policy), 30)):
        ratios = {block: norm / scales[block] for block, norm in norms_of(step).items()}
        assert set(blocks) == set(sorted(ratios, key=lambda block: -ratios[block])[:3])
    with pytest.raises(UserError, match=r"--norms_of\) has no layers.12"):
        started(policy, BLOCKS + 1)


@pytest.mark.parametrize("plan", PLANS, ids=lambda path: path.stem)
def test_the_plans_of_leads_can_be_read_and_have_one_seed(plan: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPOSITORY)
    read = read_plan(plan)
    assert read.seeds == (0,)
    assert set(read.compare_with) < set(read.of_base) < set(read.cells)


def test_both_tasks_try_the_same_leads() -> None:
    tried = [read_plan(plan) for plan in PLANS]
    assert len(tried) == 2
    assert tried[0].cells.keys() == tried[1].cells.keys()


@pytest.mark.parametrize("plan", PLANS, ids=lambda path: path.stem)
def test_runs_of_leads_count_in_the_finals(plan: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which have the same settings under the same name, and the lead's learning rate among theirs."""
    monkeypatch.chdir(REPOSITORY)
    leads, finals = read_plan(plan), read_plan(plan.with_name(plan.name.replace("leads", "finals")))
    common = leads.cells.keys() & finals.cells.keys() - finals.of_base
    assert finals.cells.keys() == common | finals.of_base
    for name in common:
        assert finals.cells[name].settings == leads.cells[name].settings, name
        assert {*leads.cells[name].learning_rates} < {*finals.cells[name].learning_rates}, name
