"""Results on disk while an evaluation goes on, so that one that was killed goes on where it was."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from agsel.errors import UserError, one_line
from agsel.evaluation.work import Measured

ABOUT, DONE = "about.json", "done.jsonl"
OWN = (ABOUT, DONE, "rank-*.jsonl")
"""What the folder may hold."""


class KeptResults:
    """A folder with the results of finished units: one file of each rank, one line of each unit.

    Args:
        folder: beside the results, until they are complete.
        about: plain values by which this evaluation can be told from any other.
    """

    def __init__(self, folder: Path, about: dict[str, Any]) -> None:
        self._folder, self._about = folder, about

    def begin(self) -> dict[int, list[Measured]]:
        """On one rank, before the others add anything.

        Returns:
            Results of the units that an earlier process has finished, by their numbers; those of another evaluation
            are removed.

        Raises:
            UserError: the folder cannot be used.
        """
        others = [path.name for path in self._folder.glob("*") if not any(map(path.match, OWN))]
        if others:
            raise UserError(
                f"{self._folder}, which an evaluation uses until it ends, holds {others[0]}: choose another --output"
            )
        try:
            done = self._read() if self._is_mine() else {}
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder.mkdir(parents=True)
            self._folder.joinpath(DONE).write_text("".join(map(_line, done.items())))
            self._folder.joinpath(ABOUT).write_text(json.dumps(self._about))
        except OSError as error:
            raise UserError(
                f"cannot write {self._folder} (--output): {one_line(error)}; choose another file"
            ) from error
        return done

    def add(self, rank: int, unit: int, results: list[Measured]) -> None:
        """Keep what a rank has found. A process that is killed meanwhile loses this unit only."""
        with self._folder.joinpath(f"rank-{rank}.jsonl").open("a") as file:
            file.write(_line((unit, results)))

    def end(self) -> None:
        """The results are complete, and elsewhere."""
        shutil.rmtree(self._folder, ignore_errors=True)

    def _is_mine(self) -> bool:
        try:
            return json.loads(self._folder.joinpath(ABOUT).read_text()) == json.loads(json.dumps(self._about))
        except (OSError, ValueError):
            return False

    def _read(self) -> dict[int, list[Measured]]:
        done: dict[int, list[Measured]] = {}
        for path in self._folder.glob("*.jsonl"):
            for line in path.read_text().splitlines(keepends=True):
                if line.endswith("\n"):  # the last one was cut if it does not
                    unit, results = json.loads(line)
                    done[unit] = results
        return done


def _line(entry: tuple[int, list[Measured]]) -> str:
    return json.dumps(entry) + "\n"
