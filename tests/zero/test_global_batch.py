"""bf16 on several ranks and on one, the same global batch: the same blocks, as long as rounding does not decide."""

from __future__ import annotations

from pathlib import Path

from tests.cases import launch_cases
from tests.zero.global_batch_ranks import STEPS

TIE = 1e-3


def is_tie(norms: dict[str, float], selected: tuple[str, ...]) -> bool:
    """Whether a selected block's norm is within `TIE` of that of a block left out."""
    worst = min(norms[name] for name in selected)
    best = max(norm for name, norm in norms.items() if name not in selected)
    return abs(worst - best) <= TIE * worst


def test_one_rank_and_several_select_the_same_blocks(tmp_path: Path) -> None:
    first, *others = (rank["selections"] for rank in launch_cases(SCRIPT, tmp_path / "several"))
    (alone,) = (rank["selections"] for rank in launch_cases(SCRIPT, tmp_path / "one", ranks=1))
    assert all(other.selected == first.selected for other in others)
    compared = 0
    for step in range(STEPS):
        if alone.modes[step] == "explore" and is_tie(alone.norms[step], alone.selected[step]):
            break
        assert alone.modes[step] == first.modes[step]
        assert alone.selected[step] == first.selected[step], step
        compared += 1
    assert compared >= 10
    assert {"explore", "exploit"} <= set(alone.modes[:compared])
    assert len(set(alone.selected[:compared])) > 2


SCRIPT = "tests/zero/global_batch_ranks.py"
