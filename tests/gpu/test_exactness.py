"""tests/zero/test_exactness.py on two GPUs."""

from tests.zero.test_exactness import *  # noqa: F403
