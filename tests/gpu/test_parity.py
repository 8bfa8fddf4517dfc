"""tests/zero/test_parity.py on two GPUs. The plain loop runs on the CPU, so losses differ in the last bits."""

import pytest

from tests.zero.test_parity import *  # noqa: F403


@pytest.fixture(scope="module")
def loss_tolerance() -> float:
    return 1e-5
