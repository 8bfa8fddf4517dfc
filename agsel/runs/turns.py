"""Caches of datasets are filled once, by one rank, whether hosts share their folder or each has its own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from agsel.place import is_first_of_host

LAST = 2
LONGEST = timedelta(days=30)
"""A turn. Other groups' collectives end a run after `--ddp_timeout`, but reading and tokenising may take hours."""


@contextmanager
def in_turns() -> Iterator[None]:
    """While inside, first rank 0, then the first rank of every other host, then all others. Every rank must enter.

    What a rank writes into a cache meanwhile, the next ones find there.
    """
    turn = 0 if dist.get_rank() == 0 else 1 if is_first_of_host() else LAST
    group = dist.new_group(backend="gloo", timeout=LONGEST)
    try:
        _let_pass(turn, group)
        try:
            yield
        finally:  # the others shall find the same error, instead of waiting
            _let_pass(LAST - turn, group)
    finally:
        dist.destroy_process_group(group)


def _let_pass(turns: int, group: Any) -> None:
    for _ in range(turns):
        dist.barrier(group)
