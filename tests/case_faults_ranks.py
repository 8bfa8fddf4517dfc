"""Cases that fail in every way a case can, between cases that do not: on the ranks of test_cases.py."""

from __future__ import annotations

import os

import torch

from tests.cases import CannotRun, run_cases


def succeeds() -> int:
    return torch.distributed.get_rank()


def fails_on_one_rank() -> None:
    """The other rank waits for it."""
    if torch.distributed.get_rank() == 1:
        raise ValueError("what went wrong")
    torch.distributed.barrier()


def dies() -> None:
    os.abort()


def cannot_run() -> None:
    raise CannotRun("this machine lacks something")


if __name__ == "__main__":
    run_cases(
        {"before": succeeds, "dies": dies, "after": succeeds, "cannot run": cannot_run, "fails": fails_on_one_rank}
    )
