"""tests/zero/test_faults.py on two GPUs."""

from tests.zero.test_faults import *  # noqa: F403
