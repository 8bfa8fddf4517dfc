"""tests/elements/test_training.py on two GPUs. The loop over whole weights runs on the CPU: last bits differ."""

import pytest

from tests.elements.test_training import *  # noqa: F403


@pytest.fixture(scope="module")
def loss_tolerance() -> float:
    return 1e-5
