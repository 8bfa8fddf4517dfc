"""Ranks of a host with fewer GPUs. tests/gpu/test_one_gpu_each.py is the same with GPUs."""

from __future__ import annotations

import re

import pytest

from agsel.errors import UserError
from agsel.runs.devices import require_device_each


@pytest.mark.parametrize(
    ("hosts", "devices"),
    [
        ("aa", ["1", "2"]),
        ("ab", ["1", "2"]),
        ("ab", ["1", "1"]),  # a GPU that two containers share, which NCCL takes for two
        ("abab", ["1", "1", "2", "2"]),
    ],
)
def test_a_gpu_for_each_is_enough(hosts: str, devices: list[str]) -> None:
    require_device_each([*hosts], devices)


@pytest.mark.parametrize(
    ("hosts", "devices", "words"),
    [
        ("aa", ["1", "1"], "2 processes on host a see 1 GPU: start one for each, as with --num_gpus 1"),
        ("aaa", ["1", "2", ""], "3 processes on host a see 2 GPUs: start one for each, as with --num_gpus 2"),
        ("aa", ["", ""], "2 processes on host a see 0 GPUs"),
        ("aabb", ["1", "2", "1", "1"], "2 processes on host b see 1 GPU:"),
        (["7 4 a", "8 4 a", "8 4 a"], ["1", "1", "1"], "2 processes on host a see 1 GPU:"),
    ],
)
def test_fewer_are_refused(hosts: str, devices: list[str], words: str) -> None:
    with pytest.raises(UserError, match=f"^{re.escape(words)}"):
        require_device_each([*hosts], devices)
