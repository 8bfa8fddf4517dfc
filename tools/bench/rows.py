"""The rows of a folder: what was measured, by configuration."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from agsel.errors import UserError, one_line
from tools.bench.compared_methods import METHODS, method_of
from tools.bench.configurations import Configuration

Row = dict[str, Any]
"""A line of rows.jsonl: the fields of `Configuration` and `Measurement`, its origin, `error`."""
PHASES = ("forward_ms", "backward_ms", "step_ms")


def measured_rows(folder: Path) -> list[Row]:
    """`read_rows` of the folder of a run.

    Raises:
        UserError: nothing has been measured there.
    """
    path = folder / "rows.jsonl"
    if not path.is_file():
        raise UserError(f"{folder} has no rows.jsonl: measure first, tools/bench.py --output {folder}")
    return read_rows(path)


def read_rows(path: Path) -> list[Row]:
    """The rows measured so far; of several of the same configuration the one with the median time.

    Raises:
        UserError: a line is no row, or one of a method that is not known.
    """
    measured: dict[Configuration, list[Row]] = {}
    for number, line in enumerate(path.read_text().splitlines(), start=1):
        try:
            row = json.loads(line)
            configuration = configuration_of(row)
            method_of(configuration)
        except (json.JSONDecodeError, TypeError, UserError) as error:
            raise UserError(f"line {number} of {path} is no row: remove it ({one_line(error)})") from error
        measured.setdefault(configuration, []).append(row)
    return [median_row(rows) for rows in measured.values()]


def median_row(rows: Sequence[Row]) -> Row:
    """The row with the median time per step, the faster of two; one that failed only if all did."""
    succeeded = sorted((row for row in rows if not row["error"]), key=lambda row: row["ms_per_step"])
    return succeeded[(len(succeeded) - 1) // 2] if succeeded else rows[-1]


def configuration_of(row: Row) -> Configuration:
    """The configuration that a row measured; an option that is younger than the row has its default."""
    return Configuration(**{field.name: row[field.name] for field in fields(Configuration) if field.name in row})


def groups(rows: Iterable[Row]) -> dict[str, list[Row]]:
    """Rows that may be compared, by what they share, in the order of `METHODS`."""
    order = list(METHODS)
    grouped: dict[str, list[Row]] = {}
    for row in sorted(rows, key=lambda row: (order.index(row["method"]), *_shares(row))):
        grouped.setdefault(configuration_of(row).setting, []).append(row)
    return grouped


def _shares(row: Row) -> tuple[float, float, float]:
    configuration = configuration_of(row)
    return configuration.fraction, configuration.density, configuration.select_from


def origins(rows: Sequence[Row]) -> list[str]:
    """Date, hardware, versions and command of the rows; one line for each that differs."""
    return list(dict.fromkeys(f"{row['date']}, {row['device']}, {row['versions']}: `{row['command']}`" for row in rows))


def gigabytes(number: float | None) -> str:
    """Bytes as 10^9 with two digits, a dash for nothing."""
    return f"{number / 1e9:.2f}" if number else "-"
