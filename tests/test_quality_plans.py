"""The plans of the quality study's leads and finals, which have to fit each other."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.distributed import REPOSITORY
from tools.comparison.plan_file import read_plan

ALL = sorted((REPOSITORY / "tools" / "quality").glob("*.yaml"))
PLANS = [path for path in ALL if path.stem.endswith("-leads")]


@pytest.mark.parametrize("plan", ALL, ids=lambda path: path.stem)
def test_every_cell_of_a_plan_has_as_many_rates(plan: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which `tools/compare_quality.py` asks for, but not where it draws tables alone."""
    monkeypatch.chdir(REPOSITORY)
    read = read_plan(plan)
    assert len({len(cell.learning_rates) for cell in read.cells.values() if cell.name not in read.of_base}) == 1


@pytest.mark.parametrize("plan", PLANS, ids=lambda path: path.stem)
def test_the_plans_of_leads_can_be_read_and_have_one_seed(plan: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPOSITORY)
    read = read_plan(plan)
    assert read.seeds == (0,)
    assert set(read.compare_with) < set(read.of_base) < set(read.cells)


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
