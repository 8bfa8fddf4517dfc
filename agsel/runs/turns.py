"""Caches of datasets are filled once, by one rank, whether hosts share their folder or each has its own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist

from agsel.place import is_first_of_host

LAST = 2


@contextmanager
def in_turns() -> Iterator[None]:
    """While inside, first rank 0, then the first rank of every other host, then all others. Every rank must enter.

    What a rank writes into a cache meanwhile, the next ones find there.
    """
    turn = 0 if dist.get_rank() == 0 else 1 if is_first_of_host() else LAST
    _let_pass(turn)
    try:
        yield
    finally:  # the others shall find the same error, instead of waiting
        _let_pass(LAST - turn)


def _let_pass(turns: int) -> None:
    for _ in range(turns):
        dist.barrier()
