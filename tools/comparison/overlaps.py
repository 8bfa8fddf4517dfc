"""Rows that a plan names twice: what was trained on, or chose the learning rate, must not be judged."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import combinations

from datasets import Dataset

CONTENT = ("prompt", "completion", "messages")
"""Columns of `agsel.data.formats` by which rows are the same."""


def said_of_overlaps(rows: Mapping[str, Dataset]) -> Iterator[str]:
    """A line for each two of several sets of rows that share some.

    Args:
        rows: in the features of `agsel.data.formats`, by what they are; the last ones are judged.
    """
    contents = {name: [hash(tuple(map(row.get, CONTENT))) for row in of_part] for name, of_part in rows.items()}
    for one, other in combinations(rows, 2):
        there = {*contents[one]}
        shared = sum(row in there for row in contents[other])
        if shared:
            yield f"note      {shared:,} of the {len(contents[other]):,} rows of {other} are among those of {one}"
