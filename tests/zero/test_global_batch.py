"""bf16 on several ranks and on one, the same global batch: the same blocks, as long as rounding does not decide."""

from __future__ import annotations

import pytest

from tests.cases import launch_cases
from tests.zero.global_batch_ranks import SCENARIOS
from tests.zero.scenario import Record

SCRIPT = "tests/zero/global_batch_ranks.py"
TIE = 1e-3


def is_tie(norms: dict[str, float], selected: tuple[str, ...]) -> bool:
    """Whether a selected block's norm is within `TIE` of that of a block left out."""
    worst = min(norms[name] for name in selected)
    best = max(norm for name, norm in norms.items() if name not in selected)
    return abs(worst - best) <= TIE * worst


@pytest.fixture(scope="module")
def several(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Record]]:
    return launch_cases(SCRIPT, tmp_path_factory.mktemp("several"))


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Record]:
    (alone,) = launch_cases(SCRIPT, tmp_path_factory.mktemp("one"), ranks=1)
    return alone


@pytest.mark.parametrize("name", SCENARIOS)
def test_one_rank_and_several_select_the_same_blocks(
    several: list[dict[str, Record]], one: dict[str, Record], name: str
) -> None:
    first, *others = (rank[name] for rank in several)
    alone = one[name]
    assert all(other.selected == first.selected for other in others)
    compared = 0
    for step in range(SCENARIOS[name].steps):
        if alone.modes[step] == "explore" and is_tie(alone.norms[step], alone.selected[step]):
            break
        assert alone.modes[step] == first.modes[step]
        assert alone.selected[step] == first.selected[step], step
        compared += 1
    assert compared >= 10
    assert set(SCENARIOS[name].policy().kinds_of_steps) <= set(alone.modes[:compared])
    assert len(set(alone.selected[:compared])) > 2
