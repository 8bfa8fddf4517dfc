"""tests/zero/test_residency.py on two GPUs: 500 steps, with blocks so wide that a copy takes longer than a kernel."""

from tests.zero.test_residency import *  # noqa: F403
