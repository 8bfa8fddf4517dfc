"""tests/zero/test_residency.py on two GPUs: 500 steps, with blocks so wide that a copy takes longer than a kernel."""

import pytest

from tests.zero.residency_ranks import CASES, LATE
from tests.zero.test_residency import *  # noqa: F403
from tests.zero.test_residency import assert_equal_to_kept


@pytest.mark.parametrize("copies", LATE)
@pytest.mark.parametrize("name", [name for name in CASES if name.endswith("mixed")])
def test_late_copies_change_nothing(ranks: list[dict], name: str, copies: str) -> None:
    assert_equal_to_kept(ranks, name, f"late {copies}")
