"""How two cells differ on the same rows, and how sure that is."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.stats import bootstrap

from agsel.errors import RunError

RESAMPLES = 10_000
SEED = 0
"""Of the resampling: the same rows give the same interval."""

Array = NDArray[np.float64]


class Interval(NamedTuple):
    """A difference, and where it lies with 95 % of the resampled rows."""

    difference: float
    low: float
    high: float


@dataclass(frozen=True)
class Judged:
    """What a run did on each row of the test part.

    Attributes:
        rows: their numbers, rising.
        tokens: float64 [rows], of the completion.
        nll: float64 [rows], mean over these tokens, in nats.
        correct: float64 [rows], 1 or 0; None if nothing was generated.
    """

    rows: list[int]
    tokens: Array
    nll: Array
    correct: Array | None

    @staticmethod
    def read(path: Path) -> Judged:
        """From the JSON Lines that launch/evaluate.py has written beside its results.

        Raises:
            RunError: there is no such file, or it is none.
        """
        try:
            with path.open(encoding="utf-8") as file:  # splitlines() would also cut at U+2028 inside of texts
                lines = sorted(map(json.loads, file), key=lambda line: line["row"])
            correct = np.array([line["correct"] for line in lines], float) if "correct" in lines[0] else None
            return Judged(
                [line["row"] for line in lines],
                np.array([line["completion_tokens"] for line in lines], float),
                np.array([line["nll"] for line in lines], float),
                correct,
            )
        except (OSError, ValueError, KeyError, IndexError) as error:
            raise RunError(f"{path} does not tell what came of each row: delete its run's folder") from error


def mean_over_seeds(runs: Sequence[Judged]) -> Judged:
    """The mean of several runs on each row.

    Raises:
        RunError: they were judged on different rows.
    """
    first = runs[0]
    if any(run.rows != first.rows or not np.array_equal(run.tokens, first.tokens) for run in runs):
        raise RunError("runs were judged on different rows, or on other tokens of them: their cells cannot be compared")
    corrects = [run.correct for run in runs if run.correct is not None]
    correct = np.mean(corrects, axis=0) if len(corrects) == len(runs) else None
    return Judged(first.rows, first.tokens, np.mean([run.nll for run in runs], axis=0), correct)


def nll_difference(one: Judged, other: Judged) -> Interval:
    """Of the mean negative log-likelihood per token, in nats: below 0 if the answers are likelier to `one`.

    Raises:
        RunError: they were judged on different rows.
    """
    mean_over_seeds([one, other])  # refuses different rows
    counted = one.tokens > 0  # a row without tokens has no loss
    return _resampled((one.tokens * (one.nll - other.nll))[counted], one.tokens[counted])


def accuracy_difference(one: Judged, other: Judged) -> Interval | None:
    """Of the share of right answers: above 0 if `one` gives more of them. None if nothing was generated.

    Raises:
        RunError: they were judged on different rows.
    """
    mean_over_seeds([one, other])
    if one.correct is None or other.correct is None:
        return None
    return _resampled(one.correct - other.correct, np.ones_like(one.tokens))


def _resampled(sums: Array, weights: Array) -> Interval:
    """The mean, sums over weights, with a percentile bootstrap over rows.

    Args:
        sums: float64 [rows].
        weights: float64 [rows].
    """

    def mean(sums: Array, weights: Array, axis: int = -1) -> Array:
        return sums.sum(axis) / weights.sum(axis)

    difference = float(mean(sums, weights))
    if len(sums) == 1:
        return Interval(difference, float("nan"), float("nan"))
    options = {"paired": True, "vectorized": True, "n_resamples": RESAMPLES, "method": "percentile", "batch": 1000}
    found = bootstrap((sums, weights), mean, rng=SEED, **options).confidence_interval
    return Interval(difference, float(found.low), float(found.high))
