"""tests/zero/test_norms.py on a GPU."""

import pytest
import torch

from tests.zero.test_norms import *  # noqa: F403


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda")
