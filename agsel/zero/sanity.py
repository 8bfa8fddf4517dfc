"""Checks of a running training: frozen weights stay as they are, ranks hold equal weights, evicted states survive.

One check watches a whole step and the way to the next: the weights before and after the optimizer step, and the
optimizer states from its end to the end of the next backward, by when those that are not needed have been moved out.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.zero.utils import is_zero_param

from agsel.blocks import Block
from agsel.errors import RunError
from agsel.zero.consensus import dissent, gather
from agsel.zero.parameters import kept_by_rank
from agsel.zero.residency import Partition, Residency

LANES = 1 << 20
"""Of 8 bytes, fingerprinted at once: 8 MiB, three times."""
ODD_FACTORS = (0xFF51AFD7ED558CCD - (1 << 64), 0xC4CEB9FE1A85EC53 - (1 << 64))
"""Of the 64-bit finalizer of MurmurHash3 (A. Appleby, public domain), as signed numbers."""


class SanityError(RunError):
    """A check has found what must never happen; the weights or states of this run cannot be trusted any more."""


class Fingerprints:
    """64-bit checksums of tensors by their bits and their order, computed on one device, wherever the tensors are.

    Each 8 bytes are mixed with their position, bijectively, and added up: a change within 8 bytes always shows, any
    other escapes with probability 2^-64. The arithmetic is of integers, so it does not depend on the order of adding.
    """

    def __init__(self, device: torch.device) -> None:
        self._positions = torch.arange(LANES, device=device).mul_(ODD_FACTORS[1])
        self._lanes = torch.empty_like(self._positions)
        self._shifted = torch.empty_like(self._positions)

    def of(self, tensors: Iterable[torch.Tensor]) -> torch.Tensor:
        """Of the tensors one after another: int64 [], on the device."""
        total = torch.zeros((), dtype=torch.int64, device=self._lanes.device)
        for tensor in tensors:
            for data in tensor.detach().reshape(-1).view(torch.uint8).split(8 * LANES):
                total = total.mul_(ODD_FACTORS[0]).add_(self._mixed(data))
        return total

    def _mixed(self, data: torch.Tensor) -> torch.Tensor:
        number = math.ceil(data.numel() / 8)
        lanes, shifted = self._lanes[:number], self._shifted[:number]
        lanes[-1:] = 0
        lanes.view(torch.uint8)[: data.numel()].copy_(data)
        lanes.add_(self._positions[:number])
        for factor in ODD_FACTORS:
            # The mask makes the arithmetic shift a logical one.
            torch.bitwise_right_shift(lanes, 32, out=shifted).bitwise_and_(0xFFFFFFFF)
            lanes.bitwise_xor_(shifted).mul_(factor)
        return lanes.bitwise_xor_(torch.bitwise_right_shift(lanes, 32, out=shifted)).sum()


class SanityChecks:
    """Checks every so many optimizer steps. Every rank must have them.

    Args:
        every: steps from one check to the next.
        blocks: all of the model, trained or not.
        residency: of the optimizer partitions.
        names: of the blocks that the partitions belong to.
        group: the data-parallel process group.
    """

    def __init__(
        self, every: int, blocks: Sequence[Block], residency: Residency, names: Sequence[str], group: Any
    ) -> None:
        self._every = every
        self._blocks = blocks
        self._residency = residency
        self._names = names
        self._group = group
        self._is_partitioned = any(is_zero_param(p) for block in blocks for p in block.parameters)
        self._fingerprints = Fingerprints(residency.device)
        self._weights: list[int] = []
        self._states: dict[Partition, int] = {}
        self._steps = self._checks = 0
        self._seconds = 0.0

    def __str__(self) -> str:
        """How many checks there were, and what they cost."""
        each = 1000 * self._seconds / max(1, self._checks)
        return f"sanity checks: {self._checks} of {self._steps} steps, {each:.0f} ms each"

    def forget(self) -> None:
        """Expect other states than before: a checkpoint is loaded, or the masters are made from the weights again."""
        self._states.clear()

    def before_step(self, number: int) -> None:
        """Between backward and optimizer step.

        Args:
            number: of the step, for the error message.

        Raises:
            SanityError: on every rank; states that lie in host memory differ from those at the end of the last step.
        """
        self._steps += 1
        start = self._now() if self._states or self._is_due else 0.0
        if self._states:
            self._require_equal_states(number)
        if self._is_due:
            self._weights = self._fingerprints_of_weights()
        if start:
            self._seconds += self._now() - start

    def after_step(self, number: int, updated: Iterable[str]) -> None:
        """After the updated weights are published.

        Args:
            number: of the step, for the error message.
            updated: names of the blocks that the step has changed.

        Raises:
            SanityError: on every rank; a frozen block has changed, or the ranks hold different weights.
        """
        if not self._is_due:
            return
        start = self._now()
        self._require_good_weights(number, set(updated))
        self._residency.synchronize()
        movable = [partition for partition in self._residency.partitions if partition.home is not None]
        self._states = dict(zip(movable, self._fingerprints_of_states(movable), strict=True))
        self._checks += 1
        self._seconds += self._now() - start

    @property
    def _is_due(self) -> bool:
        return self._steps % self._every == 0

    def _now(self) -> float:
        """In seconds, after the work that the device still has: it is not the checks'."""
        get_accelerator().synchronize()
        return time.perf_counter()

    def _require_good_weights(self, number: int, updated: set[str]) -> None:
        own = self._fingerprints_of_weights()
        names = [block.name for block in self._blocks]
        pairs = zip(names, self._weights, own, strict=True)
        changed = [name for name, before, after in pairs if name not in updated and before != after]
        by_rank = gather((changed, own if not self._is_partitioned else self._fingerprints_of_whole()), self._group)
        wrong = _found("frozen weights changed in", [blocks for blocks, _ in by_rank])
        for name, *values in zip(names, *(whole for _, whole in by_rank), strict=True):
            if len(set(values)) > 1:
                wrong.append(f"the ranks hold different weights in {name} ({dissent(values)})")
        _refuse(number, wrong)

    def _require_equal_states(self, number: int) -> None:
        self._residency.synchronize()
        evicted = [partition for partition in self._states if not partition.is_resident]
        now = zip(evicted, self._fingerprints_of_states(evicted), strict=True)
        lost = sorted({partition.block for partition, value in now if value != self._states[partition]})
        self._states.clear()
        by_rank = gather([self._names[block] for block in lost], self._group)
        _refuse(number, _found("optimizer states changed in host memory in", by_rank))

    def _fingerprints_of_weights(self) -> list[int]:
        """By block, of what this rank keeps of it: at stage 3 its partitions."""
        return self._fingerprints_of([map(kept_by_rank, block.parameters) for block in self._blocks])

    def _fingerprints_of_whole(self) -> list[int]:
        """By block, of the weights that ZeRO-3 keeps whole on every rank. The data of the others is empty."""
        return self._fingerprints_of([block.parameters for block in self._blocks])

    def _fingerprints_of_states(self, partitions: Sequence[Partition]) -> list[int]:
        return self._fingerprints_of([[partition.rows] for partition in partitions])

    def _fingerprints_of(self, groups: Sequence[Iterable[Any]]) -> list[int]:
        return torch.stack([self._fingerprints.of(group) for group in groups]).tolist() if groups else []


def _found(what: str, by_rank: Sequence[Sequence[str]]) -> list[str]:
    return [f"{what} {', '.join(blocks)} on rank {rank}" for rank, blocks in enumerate(by_rank) if blocks]


def _refuse(number: int, wrong: Sequence[str]) -> None:
    if wrong:
        raise SanityError(
            f"sanity check at step {number}: {'; '.join(wrong)}. Resume from an earlier checkpoint; if it happens "
            "again on the same rank, suspect its hardware, else report it"
        )
