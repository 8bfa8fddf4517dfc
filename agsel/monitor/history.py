"""What a run has done, in files of JSON lines that outlive kills: `metrics.jsonl`, `selection.jsonl`, `starts.jsonl`.

A run that goes on from a checkpoint does the steps after it again, so what the files say of these is cut off.
"""

from __future__ import annotations

import json
import logging
import math
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

logger = logging.getLogger("agsel")

METRICS, SELECTION, STARTS = "metrics.jsonl", "selection.jsonl", "starts.jsonl"
"""The last one has a line for every time that the run was started, and is never cut off."""
DIGITS = 4
"""Of the norms in `selection.jsonl`."""


class StepLines:
    """A file of JSON lines, in the order of their `step`.

    Args:
        path: of the file.
        after: the last step that the run has done; lines of later ones, and one that a kill has cut, are removed.
        origin: a file to begin with: that of the run whose checkpoint this one goes on from.
    """

    def __init__(self, path: Path, after: int, origin: Path | None = None) -> None:
        if origin is not None and after and origin.is_file():
            with suppress(shutil.SameFileError):
                shutil.copyfile(origin, path)
        self._file = path.open("ab", buffering=0)
        self._file.truncate(_bytes_until(path, after))
        self._waiting = bytearray()
        self._has_complained = False

    def append(self, line: Mapping[str, Any]) -> None:
        """Write a line, which from then on outlives this process. Numbers that are not finite become null.

        On a full disk lines wait for room, and the run goes on.
        """
        self._waiting += json.dumps(_finite(line), allow_nan=False, separators=(",", ":")).encode() + b"\n"
        self._write()

    def synchronise(self) -> None:
        """What has been written outlives the host, too."""
        self._write()
        with suppress(OSError):
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Nothing more is written."""
        self._write()
        self._file.close()

    def _write(self) -> None:
        try:
            while self._waiting:
                del self._waiting[: self._file.write(self._waiting)]
        except OSError as error:
            if not self._has_complained:
                logger.warning("cannot write %s (%s): its lines wait for room", self._file.name, error.strerror)
            self._has_complained = True


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The lines of a file, also while a run writes it; none if there is no file."""
    return [line for line, _ in _complete_lines(path)]


@dataclass
class SelectionHistory:
    """Which blocks every step has trained, and the gradient norms that it has measured.

    Attributes:
        blocks: their names, in forward order.
        steps: numbers of the steps, ascending.
        modes: how each was decided, as in `agsel.zero.StepReport`.
        selected: indices of the blocks that each has trained, ascending.
        norms: [blocks] of each, NaN where there was no gradient.
    """

    blocks: tuple[str, ...]
    steps: list[int] = field(default_factory=list)
    modes: list[str] = field(default_factory=list)
    selected: list[tuple[int, ...]] = field(default_factory=list)
    norms: list[np.ndarray[Any, np.dtype[np.float32]]] = field(default_factory=list)

    def add(self, step: int, mode: str, selected: Iterable[str], norms: Mapping[str, float]) -> None:
        """Remember a step."""
        chosen = set(selected)
        self.steps.append(step)
        self.modes.append(mode)
        self.selected.append(tuple(index for index, name in enumerate(self.blocks) if name in chosen))
        self.norms.append(np.array([norms.get(name, math.nan) for name in self.blocks], np.float32))

    @property
    def last_line(self) -> dict[str, Any]:
        """Of the last step in `selection.jsonl`: number, mode, indices of the blocks, norms of all blocks or null."""
        norms = [_rounded(norm) for norm in self.norms[-1].tolist()]
        return {"step": self.steps[-1], "mode": self.modes[-1], "blocks": self.selected[-1], "norms": norms}

    @property
    def heading(self) -> dict[str, Any]:
        """The first line of `selection.jsonl`, of step 0: the names of the blocks."""
        return {"step": 0, "blocks": list(self.blocks)}

    @classmethod
    def read(cls, path: Path) -> SelectionHistory:
        """The history in a `selection.jsonl`.

        Raises:
            ValueError: it does not begin with the names of the blocks.
        """
        heading, *lines = read_lines(path) or [{}]
        if heading.get("step") != 0:
            raise ValueError(f"{path} does not begin with the names of the blocks")
        history = cls(tuple(heading["blocks"]))
        for line in lines:
            history.steps.append(line["step"])
            history.modes.append(line["mode"])
            history.selected.append(tuple(line["blocks"]))
            norms = [math.nan if norm is None else norm for norm in line["norms"]]
            history.norms.append(np.array(norms, np.float32))
        return history

    def trained(self) -> np.ndarray[Any, np.dtype[np.bool_]]:
        """[blocks, steps]: whether the step has trained the block."""
        matrix = np.zeros((len(self.blocks), len(self.steps)), bool)
        for column, indices in enumerate(self.selected):
            matrix[list(indices), column] = True
        return matrix

    def measured(self) -> np.ndarray[Any, np.dtype[np.float32]]:
        """[blocks, steps]: gradient norms, NaN where none was measured."""
        return np.stack(self.norms, axis=1) if self.norms else np.empty((len(self.blocks), 0), np.float32)

    def counts(self) -> dict[str, int]:
        """How often each block was trained."""
        return dict(zip(self.blocks, map(int, self.trained().sum(axis=1)), strict=True))


def curve(lines: Sequence[Mapping[str, Any]], name: str) -> tuple[list[int], list[float]]:
    """Steps and values of one number of `metrics.jsonl`, where it was measured."""
    found = [(line["step"], line[name]) for line in lines if line.get(name) is not None]
    return [step for step, _ in found], [value for _, value in found]


def _complete_lines(path: Path) -> Iterator[tuple[dict[str, Any], int]]:
    """Lines and the bytes up to their ends; ends before one that is not whole."""
    if not path.is_file():
        return
    end = 0
    with path.open("rb") as file, suppress(ValueError):
        for text in file:
            if not text.endswith(b"\n"):
                return
            end += len(text)
            yield json.loads(text), end


def _bytes_until(path: Path, last: int) -> int:
    kept = 0
    for line, end in _complete_lines(path):
        if line["step"] > last or not last:
            break
        kept = end
    return kept


def _finite(line: Mapping[str, Any]) -> dict[str, Any]:
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in line.items()}


def _rounded(norm: float) -> float | None:
    return float(f"{norm:.{DIGITS}g}") if math.isfinite(norm) else None
