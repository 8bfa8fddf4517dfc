"""What a GPU sends to others in collectives, over which links, and how long that takes."""

from __future__ import annotations

import math
from dataclasses import dataclass

from agsel.errors import UserError
from agsel.planning.rehearsal.trace import Collective

LINK_HOP, NETWORK_HOP = 1.9e-6, 4.0e-6
"""Seconds from one GPU to the next in a ring, within a host and between two: those of NCCL's own model, protocol LL128
(`hwLat` in NCCL's `src/graph/tuning.cc`)."""
TREE_LINK_HOP, TREE_NETWORK_HOP = 1.2e-6, 8.5e-6
"""The same in a tree, which only all-reduces can use."""
LAUNCH = 10e-6
"""Seconds that every collective takes beside its hops."""


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """Data-parallel ranks, one a GPU, on hosts with equally many.

    Raises:
        UserError: the ranks do not fill the hosts.
    """

    ranks: int
    ranks_per_host: int

    def __post_init__(self) -> None:
        if self.ranks % self.ranks_per_host:
            raise UserError(
                f"gpus must be a multiple of gpus_per_host, {self.ranks_per_host}, got {self.ranks} (--gpus)"
            )

    @property
    def hosts(self) -> int:
        """How many."""
        return self.ranks // self.ranks_per_host


@dataclass(frozen=True)
class Sent:
    """Bytes that each GPU sends; it receives as many at the same time.

    Attributes:
        link: within its host, over NVLink.
        network: to other hosts.
    """

    link: float = 0.0
    network: float = 0.0

    def __add__(self, other: Sent) -> Sent:
        return Sent(self.link + other.link, self.network + other.network)

    def __mul__(self, times: int) -> Sent:
        return Sent(times * self.link, times * self.network)


def sent(collective: Collective, cluster: Cluster) -> Sent:
    """What a collective lets each GPU send, in rings through all GPUs as NCCL makes them.

    Each of n ranks sends S (n - 1) / n of the whole S for an all-gather or a reduce-scatter, and twice that for an
    all-reduce, which is one after the other (NCCL tests, doc/PERFORMANCE.md, "Bus bandwidth"; ZeRO, arXiv 1910.02054,
    section 7). A host with g GPUs and a network card for each makes g rings, each of which leaves it by another GPU and
    carries S / g: so a GPU sends one g-th of its bytes over the network, and the rest to its neighbours.
    """
    total = _passes(collective) * collective.nbytes * (cluster.ranks - 1) / cluster.ranks
    if cluster.hosts == 1:
        return Sent(link=total)
    network = total / cluster.ranks_per_host
    return Sent(total - network, network)


def latency(collective: Collective, cluster: Cluster) -> float:
    """Seconds that a collective of a few bytes takes: the hops of a ring, or of a tree if that is quicker."""
    passes, between = _passes(collective), cluster.hosts - 1
    ring = passes * ((cluster.ranks - 1 - between) * LINK_HOP + between * NETWORK_HOP)
    if collective.operation != "all-reduce":
        return LAUNCH + ring
    inside = (cluster.ranks_per_host - 1) * TREE_LINK_HOP
    return LAUNCH + min(ring, 2 * (inside + math.ceil(math.log2(cluster.hosts)) * TREE_NETWORK_HOP))


def transfer_seconds(collective: Collective, cluster: Cluster, link_speed: float, network_speed: float) -> float:
    """Seconds that a collective takes; NVLink and network work at the same time."""
    bytes_sent = sent(collective, cluster)
    return latency(collective, cluster) + max(bytes_sent.link / link_speed, bytes_sent.network / network_speed)


def _passes(collective: Collective) -> int:
    return 2 if collective.operation == "all-reduce" else 1
