"""The largest numbers are those of a plain stable sort; with ranks, see test_choosing.py."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from agsel.elements import largest as module
from agsel.elements.largest import largest
from tests.elements.choosing_ranks import KINDS, budgets_of, numbers


def sorted_places(vectors: list[Tensor], budget: int) -> list[list[int]]:
    """Of the largest, by vector, after a stable sort of all numbers in their order."""
    values = np.concatenate([vector.numpy() for vector in vectors])
    taken = np.zeros(len(values), dtype=bool)
    taken[np.argsort(-values, kind="stable")[:budget]] = True
    pieces = np.split(taken, np.cumsum([vector.numel() for vector in vectors])[:-1])
    return [np.flatnonzero(piece).tolist() for piece in pieces]


@pytest.mark.parametrize("kind", KINDS)
def test_equals_a_stable_sort(kind: str) -> None:
    vectors = numbers(kind)
    for budget in budgets_of(vectors):
        assert [places.tolist() for places in largest(vectors, budget)] == sorted_places(vectors, budget), budget


def test_ties_go_to_earlier_vectors_and_places() -> None:
    vectors = [torch.tensor([1.0, 3.0, 1.0]), torch.tensor([1.0, 5.0]), torch.tensor([3.0, 1.0])]
    assert [places.tolist() for places in largest(vectors, 5)] == [[0, 1, 2], [1], [0]]


def test_every_budget_of_many_ties() -> None:
    vectors = [vector[:15] for vector in numbers("few values")]
    for budget in range(1, sum(vector.numel() for vector in vectors) + 1):
        assert [places.tolist() for places in largest(vectors, budget)] == sorted_places(vectors, budget)


def test_looks_at_numbers_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CHUNK", 7)
    vectors = numbers("few values")
    for budget in budgets_of(vectors):
        assert [places.tolist() for places in largest(vectors, budget)] == sorted_places(vectors, budget)


def test_positions_are_int64_and_the_numbers_stay() -> None:
    vectors = numbers("ranges")
    before = [vector.clone() for vector in vectors]
    assert {places.dtype for places in largest(vectors, 9)} == {torch.int64}
    assert all(torch.equal(vector, value) for vector, value in zip(vectors, before, strict=True))
