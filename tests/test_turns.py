"""Caches are filled once, however long that takes."""

from tests.distributed import run_ranks


def test_a_turn_may_take_longer_than_a_collective() -> None:
    said = run_ranks("tests/turns_ranks.py").splitlines()
    assert [line for line in said if line.startswith(("begins", "ends"))] == [
        "begins 0",
        "ends 0",
        "begins 1",
        "ends 1",
    ]
