"""Rows of one configuration on growing numbers of GPUs, and what they say about each other."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

from tools.bench.compared_methods import canonical
from tools.bench.configurations import Configuration
from tools.bench.rows import Row, configuration_of

FULL = "full"


@dataclass(frozen=True)
class Series:
    """Rows of one configuration on growing numbers of GPUs.

    Attributes:
        configuration: of the row with the fewest.
        rows: by number of GPUs, in rising order.
    """

    configuration: Configuration
    rows: dict[int, Row]

    def efficiency(self, ranks: int) -> float:
        """Tokens per second and GPU on so many GPUs, as a share of those on the fewest."""
        return float(self.rows[ranks]["tokens_per_second"] / self._alone["tokens_per_second"])

    def efficiency_of_gradients(self, ranks: int) -> float | None:
        """The same of forward and backward alone, for equal rows per GPU; None where phases are not told apart.

        The optimizer step does not get the same work on more GPUs, because ZeRO divides it among them.
        """
        alone, together = ([row["forward_ms"], row["backward_ms"]] for row in (self._alone, self.rows[ranks]))
        return None if None in alone + together else float(sum(alone) / sum(together))

    def price_of_moving(self, ranks: int, others: Iterable[Series]) -> float | None:
        """How much longer a step takes than one whose states all stay on the GPU; None where no other row is of one."""
        beside = find(replace(self.configuration, offload_states=False), others)
        if beside is None or beside is self or ranks not in beside.rows:
            return None
        return float(self.rows[ranks]["ms_per_step"] / beside.rows[ranks]["ms_per_step"] - 1)

    def ahead_of_full(self, ranks: int, others: Iterable[Series]) -> float | None:
        """The efficiency minus that of full fine-tuning with the same model, stage, shape and kernels, if measured."""
        full = find(canonical(replace(self.configuration, method=FULL)), others)
        if full is None or full is self or ranks not in full.rows:
            return None
        return self.efficiency(ranks) - full.efficiency(ranks)

    def equal_rows(self, scaling: str) -> int:
        """Rows that stay the same while GPUs are added: of each in weak scaling, of all in strong scaling."""
        return self.configuration.micro_batch * (1 if scaling == "weak" else self.configuration.ranks)

    @property
    def _alone(self) -> Row:
        return next(iter(self.rows.values()))

    @property
    def place(self) -> tuple[Any, ...]:
        """To sort by: the larger of two models comes later, then higher stages, then agsel."""
        one = self.configuration
        return self._alone["flops_per_token"], one.stage, one.method != FULL, one.method


def weak_scaling(rows: Iterable[Row]) -> list[Series]:
    """Series with equal rows per GPU."""
    return _series(rows, lambda configuration: replace(configuration, ranks=1))


def strong_scaling(rows: Iterable[Row]) -> list[Series]:
    """Series with equal rows on all GPUs together."""
    return _series(rows, lambda one: replace(one, ranks=1, micro_batch=one.micro_batch * one.ranks))


def _series(rows: Iterable[Row], shared: Callable[[Configuration], Configuration]) -> list[Series]:
    found: dict[Configuration, dict[int, Row]] = {}
    for row in sorted(rows, key=lambda row: row["ranks"]):
        found.setdefault(shared(configuration_of(row)), {})[row["ranks"]] = row
    series = [Series(configuration_of(next(iter(members.values()))), members) for members in found.values()]
    return sorted((one for one in series if len(one.rows) > 1), key=lambda one: one.place)


def find(configuration: Configuration, series: Iterable[Series]) -> Series | None:
    """The series of this configuration, if there is one."""
    return next((one for one in series if one.configuration == configuration), None)
