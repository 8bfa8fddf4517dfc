"""tests/test_resume.py on two GPUs, in bf16 with deterministic kernels."""

from tests.test_resume import *  # noqa: F403
