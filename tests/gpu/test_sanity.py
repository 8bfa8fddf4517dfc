"""tests/zero/test_sanity.py on two GPUs."""

from tests.zero.test_sanity import *  # noqa: F403
