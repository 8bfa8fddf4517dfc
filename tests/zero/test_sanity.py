"""Sanity checks: they change nothing, and one flipped bit on one rank ends all ranks by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from agsel.zero.sanity import LANES, Fingerprints
from tests.cases import launch_cases
from tests.zero.test_faults import NAMED

STAGES = (1, 2, 3)
FOUND = {
    "frozen": "sanity check at step 2: frozen weights changed in {block} on rank 1",
    "different": "sanity check at step 2: the ranks hold different weights in {block} (" + NAMED,
    "lost": "sanity check at step 3: optimizer states changed in host memory in {block} on rank 1",
}
FOUND |= {"frozen-elements": FOUND["frozen"], "without its value": FOUND["different"]}
STAGES_OF = dict.fromkeys(FOUND, STAGES) | {"frozen-elements": (2, 3), "without its value": (1, 2)}
"""At stage 3 no rank holds what another does of a partitioned weight that is updated."""


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return launch_cases("tests/zero/sanity_ranks.py", tmp_path_factory.mktemp("sanity"))


@pytest.mark.parametrize("case", [*(f"clean-{stage}" for stage in STAGES), "clean-elements-2", "clean-elements-3"])
def test_checks_change_nothing_and_say_what_they_cost(ranks: list[dict[str, Any]], case: str) -> None:
    for rank in ranks:
        run = rank[case]
        assert all(torch.equal(run["checked"][name], weight) for name, weight in run["plain"].items())
        assert run["summary"].startswith("sanity checks: 4 of 8 steps, ")
        assert run["absent"]


@pytest.mark.parametrize(("kind", "stage"), [(kind, stage) for kind in FOUND for stage in STAGES_OF[kind]])
def test_one_flipped_bit_ends_all_ranks_by_name(ranks: list[dict[str, Any]], kind: str, stage: int) -> None:
    for rank in ranks:
        block, message = rank[f"{kind}-{stage}"]
        assert message is not None
        assert message.startswith(FOUND[kind].format(block=block))


@pytest.mark.parametrize("stage", STAGES)
def test_masters_made_from_the_weights_again_are_no_fault(ranks: list[dict[str, Any]], stage: int) -> None:
    assert [rank[f"refreshed-{stage}"] for rank in ranks] == [None] * len(ranks)


@pytest.fixture(scope="module")
def fingerprint() -> Callable[..., int]:
    fingerprints = Fingerprints(torch.device("cpu"))
    return lambda *tensors: int(fingerprints.of(tensors))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_every_bit_and_every_place_counts(dtype: torch.dtype, fingerprint: Callable[..., int]) -> None:
    """In a tensor with a ragged end, whose start is not aligned to 8 bytes."""
    tensor = torch.randn(24, generator=torch.Generator().manual_seed(0)).to(dtype)[1:]
    seen = {fingerprint(tensor)}
    for byte in range(tensor.nbytes):
        for bit in range(8):
            flipped = tensor.clone()
            flipped.view(torch.uint8)[byte] ^= 1 << bit
            seen.add(fingerprint(flipped))
    for first in range(len(tensor)):
        for second in range(first):
            swapped = tensor.clone()
            swapped[[first, second]] = tensor[[second, first]]
            seen.add(fingerprint(swapped))
    assert len(seen) == 1 + 8 * tensor.nbytes + len(tensor) * (len(tensor) - 1) // 2


def test_changes_that_cancel_in_a_weighted_sum_do_not_here(fingerprint: Callable[..., int]) -> None:
    """Two signs at the top of 8 bytes: 2^63 times an even number is zero."""
    ones = torch.ones(4096)
    seen = {fingerprint(ones)}
    for place in range(3, 4096, 2):
        changed = ones.clone()
        changed[1] = changed[place] = -1
        seen.add(fingerprint(changed))
    assert len(seen) == 1 + len(range(3, 4096, 2))


def test_long_tensors_and_several_tensors_have_an_order(fingerprint: Callable[..., int]) -> None:
    first, second = torch.ones(2 * LANES), torch.zeros(2 * LANES)
    assert fingerprint(torch.cat([first, second])) != fingerprint(torch.cat([second, first]))
    assert fingerprint(first, second) != fingerprint(second, first)
    assert fingerprint(first, second) == fingerprint(first.clone(), second.clone())
