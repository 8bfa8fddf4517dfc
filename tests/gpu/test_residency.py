"""tests/zero/test_residency.py on two GPUs: 500 steps, with blocks so wide that a copy takes longer than a kernel."""

from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.cases import Results, launch_cases
from tests.zero.residency_ranks import AGAIN, CASES, LATE
from tests.zero.test_residency import *  # noqa: F403
from tests.zero.test_residency import assert_equal_to_kept

LAUNCHES = 5
"""At the same time: one after the other, the cases take a quarter of an hour."""


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[Results]:
    folders = [tmp_path_factory.mktemp("residency") for _ in range(LAUNCHES)]  # by threads, the first two may collide

    def launched(number: int) -> list[Results]:
        return launch_cases("tests/zero/residency_ranks.py", folders[number], *[*CASES, *AGAIN][number::LAUNCHES])

    with ThreadPoolExecutor(LAUNCHES) as executor:
        results = list(executor.map(launched, range(LAUNCHES)))
    first, *others = results
    for launch in others:
        for rank, found in zip(first, launch, strict=True):
            rank.update(found)
    return first


@pytest.mark.parametrize("copies", LATE)
@pytest.mark.parametrize("name", [name for name in CASES if name.endswith("mixed")])
def test_late_copies_change_nothing(ranks: list[Results], name: str, copies: str) -> None:
    assert_equal_to_kept(ranks, name, f"late {copies}")
