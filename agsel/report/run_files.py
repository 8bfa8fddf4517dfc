"""What the folder of a run tells, as far as its files are there: runs are older, killed, or still going on."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

import yaml

from agsel.errors import UserError
from agsel.monitor import METRICS, SELECTION, STARTS, SelectionHistory
from agsel.monitor.history import curve, read_lines
from agsel.runs.checkpoints import checkpoints_in, missing_part
from agsel.runs.preemption import MARKER

CONFIGURATION, ENVIRONMENT, RESULT, COUNTS = "config.yaml", "environment.json", "result.json", "selection.json"
OF_A_RUN = (CONFIGURATION, ENVIRONMENT, RESULT, COUNTS, METRICS, SELECTION, MARKER)
MODELS = ("model", "merged")
Content = TypeVar("Content")


@dataclass(frozen=True)
class Saved:
    """A checkpoint or model.

    Attributes:
        name: of the folder.
        size: of all its files, in bytes.
        changed: when the newest of them was written.
        fault: why it cannot be used, None if nothing is known.
    """

    name: str
    size: int
    changed: datetime
    fault: str | None = None


@dataclass(frozen=True)
class Run:
    """A run by its files.

    Attributes:
        folder: of the run.
        label: its name among the runs of a report.
        metrics: the lines of `metrics.jsonl`; of an older run, what its newest checkpoint has logged.
        history: of the selection, None where it is not recorded.
        counts: how often each block was trained.
        starts: the lines of `starts.jsonl`.
        stopped: what the marker of a run says that was asked to stop.
        saved: checkpoints by step, and models.
        unreadable: what is wrong with files that are there.
    """

    folder: Path
    label: str
    metrics: Sequence[Mapping[str, Any]]
    history: SelectionHistory | None
    counts: Mapping[str, int]
    configuration: Mapping[str, Any]
    environment: Mapping[str, Any]
    result: Mapping[str, Any]
    starts: Sequence[Mapping[str, Any]]
    stopped: Mapping[str, Any]
    saved: Sequence[Saved]
    unreadable: Sequence[str]

    @property
    def steps(self) -> int:
        """Optimizer steps that the run is known to have done."""
        recorded = self.history.steps if self.history else []
        return max(self.result.get("steps", 0), *(line["step"] for line in self.metrics), *recorded, 0, 0)

    @property
    def is_finished(self) -> bool:
        """Whether all is there that a run leaves behind; a result may be older than the last steps."""
        return self.result.get("steps") == self.steps

    def last(self, name: str) -> float | None:
        """The last value of a number in the metrics."""
        values = self.values(name)
        return values[-1] if values else None

    def values(self, name: str) -> list[float]:
        """All values of a number in the metrics."""
        return curve(self.metrics, name)[1]

    def curve(self, name: str, over: str) -> tuple[list[float], list[float]]:
        """A number over another one of the metrics, as `step` or `seconds`."""
        found = [
            (line[over], line[name])
            for line in self.metrics
            if line.get(name) is not None and line.get(over) is not None
        ]
        return [x for x, _ in found], [y for _, y in found]


def read_runs(folders: Sequence[Path]) -> list[Run]:
    """The runs in these folders.

    Raises:
        UserError: a folder does not hold a run.
    """
    for folder in folders:
        if not any((folder / name).is_file() for name in OF_A_RUN):
            what = "holds no run" if folder.is_dir() else "is no folder"
            raise UserError(f"{folder} {what}: name the --output_dir of a run of launch/train.py")
    return [_read_run(folder, label) for folder, label in zip(folders, labels_of(folders), strict=True)]


def labels_of(folders: Sequence[Path]) -> list[str]:
    """Names of folders, with as much of their paths as tells them apart, or a number for one that comes again."""
    paths = [folder.resolve() for folder in folders]
    labels = []
    for index, path in enumerate(paths):
        others = {other.parts for other in paths} - {path.parts}
        depth = next(n for n in range(1, len(path.parts) + 1) if all(path.parts[-n:] != o[-n:] for o in others))
        again = paths[:index].count(path)
        labels.append("/".join(path.parts[-depth:]) + (f" ({again + 1})" if again else ""))
    return labels


def _read_run(folder: Path, label: str) -> Run:
    files = _Files(folder)
    history = files.read(SELECTION, SelectionHistory.read, None)
    history = history if history and history.steps else None
    counts = dict(files.mapping(COUNTS, _json).get("counts", {}))
    if history and (history.steps[0] == 1 or not counts):  # else an older version has begun the run
        counts = history.counts()
    return Run(
        folder,
        label,
        metrics=files.read(METRICS, _step_lines, []) or _logged_in_checkpoint(files),
        history=history,
        counts=counts,
        configuration=files.mapping(CONFIGURATION, _yaml),
        environment=files.mapping(ENVIRONMENT, _json),
        result=files.mapping(RESULT, _json),
        starts=files.read(STARTS, _step_lines, []),
        stopped=files.mapping(MARKER, _json),
        saved=list(_saved(folder)),
        unreadable=files.unreadable,
    )


class _Files:
    """Files of a folder, of which one that cannot be read is only noted."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.unreadable: list[str] = []

    def read(self, name: str, reader: Callable[[Path], Content], absent: Content) -> Content:
        path = self.folder / name
        if not path.is_file():
            return absent
        try:
            return reader(path)
        except (OSError, ValueError, LookupError, TypeError, AttributeError, yaml.YAMLError) as error:
            self.unreadable.append(f"{name}: {type(error).__name__}: {error}")
            return absent

    def mapping(self, name: str, reader: Callable[[Path], Any]) -> dict[str, Any]:
        """What a file says by name; nothing else belongs into it."""
        return self.read(name, lambda path: dict(reader(path)), {})


def _json(path: Path) -> Any:
    return json.loads(path.read_text())


def _yaml(path: Path) -> Any:
    return yaml.safe_load(path.read_text())


def _step_lines(path: Path) -> list[dict[str, Any]]:
    lines = read_lines(path)
    if not all(isinstance(line, dict) and isinstance(line.get("step"), int) for line in lines):
        raise ValueError("a line has no step")
    return lines


def _logged_in_checkpoint(files: _Files) -> list[dict[str, Any]]:
    for checkpoint in reversed(checkpoints_in(files.folder)):
        state = files.mapping(f"{checkpoint.name}/trainer_state.json", _json)
        if state.get("log_history"):
            return list(state["log_history"])
    return []


def _saved(folder: Path) -> Iterator[Saved]:
    for checkpoint in checkpoints_in(folder):
        yield _measure(checkpoint, missing_part(checkpoint))
    for name in MODELS:
        if (folder / name).is_dir():
            yield _measure(folder / name, None)


def _measure(folder: Path, fault: str | None) -> Saved:
    stats = [path.stat() for path in folder.rglob("*") if path.is_file()] or [folder.stat()]
    changed = max(stat.st_mtime for stat in stats)
    return Saved(folder.name, sum(stat.st_size for stat in stats), datetime.fromtimestamp(changed, UTC), fault)
