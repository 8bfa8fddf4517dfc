"""What the ranks tell each other: one small all-reduce per step, settings at the start, what one did for all."""

from __future__ import annotations

import json
import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any, TypeVar

import torch
from deepspeed import comm as dist

from agsel.errors import RunError, UserError

CHECKSUM_BITS = 20
"""Small enough that the sum of squared checksums stays an exact fp64 integer for 8192 ranks."""
SECONDS_BETWEEN_MEETINGS = 10.0

Result = TypeVar("Result")


class RanksDisagreeError(RunError):
    """The ranks hold different selection states: going on would train different blocks on different ranks."""


def checksum(state: Any) -> int:
    """A `CHECKSUM_BITS`-bit checksum of plain Python values."""
    return zlib.crc32(json.dumps(state, sort_keys=True).encode()) >> (32 - CHECKSUM_BITS)


def global_squares(local: torch.Tensor, state_checksum: int, group: Any, step: int) -> list[float]:
    """All-reduce the squared block norms, and compare the ranks' selection states in the same vector.

    Args:
        local: fp64 [blocks], sums of squares over this rank's disjoint gradient partitions.
        state_checksum: `checksum` of what must be equal on all ranks.
        group: the data-parallel process group.
        step: for the error message.

    Returns:
        The squared global norm of every block; a non-finite gradient on any rank shows as a non-finite value on all.

    Raises:
        RanksDisagreeError: on every rank, if the checksums are not all equal.
    """
    own = torch.tensor([state_checksum, state_checksum**2], dtype=local.dtype, device=local.device)
    vector = torch.cat([local, own])
    dist.all_reduce(vector, group=group)
    *squares, total, total_of_squares = vector.tolist()
    # Cauchy-Schwarz: (Σc)² = n Σc² only if all c are equal. Every rank sees the same sums, so all raise or none.
    if int(total) ** 2 != dist.get_world_size(group=group) * int(total_of_squares):
        raise RanksDisagreeError(
            f"ranks disagree on the selection state at step {step} ({dissent(gather(state_checksum, group))}): "
            "give every rank the same seed and settings, and change the policy on all ranks or on none"
        )
    return squares


def require_equal_settings(settings: dict[str, Any], group: Any = None) -> None:
    """Compare the settings of all ranks of a process group, by default of the run. Every rank must call it.

    Raises:
        UserError: on every rank, naming the settings that differ and their values by rank.
    """
    by_rank = gather(settings, group)
    keys = sorted({key for rank_settings in by_rank for key in rank_settings})
    values = {key: [rank_settings.get(key) for rank_settings in by_rank] for key in keys}
    different = {key: ranks for key, ranks in values.items() if any(value != ranks[0] for value in ranks)}
    if different:
        listed = "; ".join(f"{key} is {' and '.join(map(repr, ranks))}" for key, ranks in different.items())
        raise UserError(f"the ranks have different settings: {listed}; start every rank with the same command")


def dissent(checksums: Sequence[int]) -> str:
    """Which ranks differ, given the checksums by rank: those against the majority, if there is one."""
    common, votes = Counter(checksums).most_common(1)[0]
    if 2 * votes <= len(checksums):
        return "checksums by rank: " + ", ".join(f"{checksum & (1 << 64) - 1:x}" for checksum in checksums)
    others = [str(rank) for rank, checksum in enumerate(checksums) if checksum != common]
    return f"not like the others: rank {', '.join(others)}"


def gather(value: Any, group: Any) -> list[Any]:
    """The values of all ranks of a process group, by rank. Every rank must call it."""
    values: list[Any] = [None] * torch.distributed.get_world_size(group)
    torch.distributed.all_gather_object(values, value, group=group)
    return values


def first_rank_does(work: Callable[[], Result], group: Any) -> Result:
    """What `work` returns on the first rank, on every rank; or its error.

    The ranks keep meeting while they wait, because work may take longer than a collective is allowed to.
    """
    with ThreadPoolExecutor(max_workers=1) as executor:
        future = executor.submit(work) if torch.distributed.get_rank(group) == 0 else None
        while (outcome := gather(_outcome(future), group)[0]) is None:
            pass
    result, error = outcome
    if future is not None:
        return future.result()
    if error is not None:
        raise error
    return result


def every_rank_does(work: Callable[[], None], group: Any) -> None:
    """Wait until all ranks have done their work; what was wrong on the first rank that failed is raised on all.

    They keep meeting while they wait, as in `first_rank_does`.
    """
    with ThreadPoolExecutor(max_workers=1) as executor:
        future = executor.submit(work)
        while None in (outcomes := gather(_outcome(future), group)):
            pass
    future.result()
    for _, error in filter(None, outcomes):
        if error is not None:
            raise error


def _outcome(future: Future[Result] | None) -> tuple[Result | None, BaseException | None] | None:
    """Result and error of work, None while it goes on."""
    if future is None or not wait([future], timeout=SECONDS_BETWEEN_MEETINGS).done:
        return None
    error = future.exception()
    return (future.result() if error is None else None, error)
