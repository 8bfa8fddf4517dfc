"""Sums of squares of gradients as large as real ones, against fp64."""

from __future__ import annotations

import pytest
import torch

from agsel.zero.selective_step import sums_of_squares


@pytest.fixture
def device() -> torch.device:
    return torch.device("cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_large_gradients_lose_no_digits(device: torch.device, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    groups = [[torch.randn(count, generator=generator).to(dtype) for count in counts] for counts in ((2**23, 5), (7,))]
    on_device = [[tensor.to(device) for tensor in group] for group in groups]
    expected = [sum(float(tensor.double().square().sum()) for tensor in group) for group in groups]
    assert sums_of_squares(on_device, device).tolist() == pytest.approx(expected, rel=2e-6)


def test_a_group_without_gradients_has_none(device: torch.device) -> None:
    assert sums_of_squares([[], [torch.full((4,), 2.0, device=device)]], device).tolist() == [0, 16]
    assert sums_of_squares([[], []], device).tolist() == [0, 0]
