"""tests/zero/test_checkpoint.py on two GPUs."""

from tests.zero.test_checkpoint import *  # noqa: F403
