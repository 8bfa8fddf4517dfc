"""tests/zero/test_global_batch.py on two GPUs and one."""

from tests.zero.test_global_batch import *  # noqa: F403
