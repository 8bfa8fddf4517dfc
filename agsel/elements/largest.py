"""The largest of numbers that are spread over the ranks: an exact choice, in three small collectives."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from agsel.elements.collectives import gathered, place, reduced

LOW_BITS = 15
"""The bits of a non-negative fp32 number, read as an integer, are in its order; the upper 16 are looked at first."""
CHUNK = 1 << 26
"""Numbers whose bits are looked at together."""


def largest(shares: Sequence[Tensor], budget: int, group: Any = None) -> list[Tensor]:
    """Where the `budget` largest numbers of some vectors are, each rank holding a slice. Every rank must call it.

    Of equal numbers at the limit those of an earlier vector come first, and within one those that are further in front:
    the choice does not depend on how many ranks there are.

    Args:
        shares: fp32, not negative, on one device: this rank's slice of each vector; the slices of the ranks, one after
            another, are the vector.
        budget: 1 or more, and not more than there are numbers.
        group: process group of the ranks; None for all, or without any.

    Returns:
        int64 positions in each share, ascending.
    """
    device = shares[0].device
    uppers = (bits >> LOW_BITS for bits in _chunks(shares))
    upper, needed = _limit(_counts(uppers, 1 << 16, device, group), budget)
    lowers = (bits[bits >> LOW_BITS == upper] & ((1 << LOW_BITS) - 1) for bits in _chunks(shares))
    lower, needed = _limit(_counts(lowers, 1 << LOW_BITS, device, group), needed)
    limit = (upper << LOW_BITS) + lower
    ties = torch.stack([(_bits(share) == limit).sum() for share in shares])
    taken = _shared_out([counts.tolist() for counts in gathered(ties, group)], needed)
    rank, _ = place(group)
    return [_chosen(_bits(share), limit, count) for share, count in zip(shares, taken[rank], strict=True)]


def _chosen(bits: Tensor, limit: int, ties: int) -> Tensor:
    above = (bits > limit).nonzero().view(-1)
    equal = (bits == limit).nonzero().view(-1)[:ties]
    return torch.cat([above, equal]).sort().values


def _bits(numbers: Tensor) -> Tensor:
    return numbers.view(torch.int32)


def _chunks(shares: Sequence[Tensor]) -> Iterator[Tensor]:
    """The bits of all of them, not too many at a time."""
    return (_bits(chunk) for share in shares for chunk in share.split(CHUNK))


def _counts(values: Iterable[Tensor], kinds: int, device: torch.device, group: Any) -> Tensor:
    """int64 [kinds]: how often each value occurs on all ranks together."""
    counts = torch.zeros(kinds, dtype=torch.int64, device=device)
    for chunk in values:
        counts += torch.bincount(chunk, minlength=kinds)
    return reduced(counts, group)


def _limit(counts: Tensor, budget: int) -> tuple[int, int]:
    """The value down to which the largest `budget` reach, and how many of that value are among them."""
    from_top = counts.flip(0).cumsum(0)
    place = int(torch.searchsorted(from_top, torch.tensor(budget, device=counts.device)))
    above = int(from_top[place - 1]) if place else 0
    return len(counts) - 1 - place, budget - above


def _shared_out(ties: list[list[int]], needed: int) -> list[list[int]]:
    """How many numbers at the limit are taken, of those that there are by rank and vector."""
    taken = [[0] * len(counts) for counts in ties]
    for vector in range(len(ties[0])):
        for rank, counts in enumerate(ties):
            taken[rank][vector] = min(needed, counts[vector])
            needed -= taken[rank][vector]
    return taken
