"""The parts of the page that are words: what a run is, how it went, and in what runs differ."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from typing import Any

from agsel.monitor import block_ranges, duration
from agsel.report import wording
from agsel.report.final_numbers import FinalNumber
from agsel.report.run_files import Run

UNKNOWN = "unknown"
MAIN_SETTINGS = (
    "model_name_or_path",
    "dataset_name",
    "datasets",
    "method",
    "select_fraction",
    "select_blocks",
    "select_from",
    "elements",
    "element_density",
    "use_peft",
    "learning_rate",
    "lr_scheduler_type",
    "num_train_epochs",
    "max_steps",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "max_length",
    "packing",
    "bf16",
    "seed",
)
OF_THE_FOLDER = ("output_dir", "run_name")
OF_THE_START = ("date", "command")
Rows = list[tuple[str, list[str]]]


def title_of(run: Run) -> str:
    """What it has trained, and how."""
    model = run.configuration.get("model_name_or_path")
    method = run.configuration.get("method")
    return f"{method} on {_end(model)}" if method and model else run.label


def data_of(run: Run) -> str:
    """What it has learnt from."""
    datasets = run.configuration.get("datasets") or []
    name = run.configuration.get("dataset_name")
    return str(name) if name else ", ".join(_path_of(dataset) for dataset in datasets) or UNKNOWN


def state_of(run: Run) -> str:
    """Whether it has come to its end."""
    if run.is_finished:
        return f"finished, {run.steps:,} steps"
    if run.stopped:
        return f"stopped after step {run.stopped.get('step', run.steps):,}: {run.stopped.get('reason')}"
    return f"not finished: the last step known is {run.steps:,}"


def interruptions_of(run: Run) -> list[str]:
    """When and where it was started again, and what that cost."""
    told = [_start(start) for index, start in enumerate(run.starts) if index or start["step"]]
    if run.stopped:
        told.append(f"{_moment(run.stopped.get('time'))}: {state_of(run)}")
    return told


def never_trained(run: Run) -> str:
    """The blocks that no step has trained, empty if there are none."""
    return block_ranges(name for name, count in run.counts.items() if not count) if any(run.counts.values()) else ""


def facts(mapping: Mapping[str, Any], names: Iterable[str] | None = None) -> list[tuple[str, str]]:
    """Names and values; of nested ones the names are joined by dots.

    Args:
        mapping: what is said by name.
        names: those that are wanted and not null, in this order; all by default.
    """
    flat = dict(_flat(mapping))
    wanted = list(flat) if names is None else [name for name in names if flat.get(name) is not None]
    return [(name, _shown(flat[name])) for name in wanted]


def final_table(runs: Sequence[Run], numbers: Sequence[FinalNumber]) -> list[tuple[str, list[tuple[str, str]]]]:
    """Rows of final numbers: for each run the value, and its difference to that of the first run."""
    table = []
    for number in numbers:
        values = [number.of(run) for run in runs]
        if any(value is not None for value in values):
            table.append((number.title, [_compared(number, value, values[0], n > 0) for n, value in enumerate(values)]))
    return table


def differing(mappings: Sequence[Mapping[str, Any]], without: Iterable[str] = ()) -> Rows:
    """Rows of what is not the same in all of them."""
    flats = [{name: _shown(value) for name, value in _flat(mapping)} for mapping in mappings]
    names = dict.fromkeys(name for flat in flats for name in flat if name not in set(without))
    rows = [(name, [flat.get(name, UNKNOWN) for flat in flats]) for name in names]
    return [(name, values) for name, values in rows if len(set(values)) > 1]


def _compared(number: FinalNumber, value: float | None, base: float | None, is_compared: bool) -> tuple[str, str]:
    if value is None:
        return UNKNOWN, ""
    return number.shown(value), number.difference(value, base) if is_compared and base is not None else ""


def _flat(mapping: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in mapping.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{before}{name}.")
        else:
            yield f"{before}{name}", value


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, default=str, ensure_ascii=False)


def _start(start: Mapping[str, Any]) -> str:
    text = f"{_moment(start.get('time'))}: went on after step {start['step']:,}"
    again = start.get("reached", 0) - start["step"]
    if again > 0:
        text += f", {again:,} steps were done again"
    if "stopped" in start and "time" in start:
        stood = datetime.fromisoformat(start["time"]) - datetime.fromisoformat(start["stopped"])
        text += f"; the last step before was {duration(stood.total_seconds())} earlier"
    return text


def _moment(time: str | None) -> str:
    return wording.moment(time) if time else "at an unknown time"


def _end(name: str) -> str:
    """Of a path the last part; of a name on the hub all of it."""
    return name.rstrip("/").rpartition("/")[2] if name.startswith(("/", ".", "~")) else name


def _path_of(dataset: Any) -> str:
    return str(dataset.get("path", dataset)) if isinstance(dataset, Mapping) else str(dataset)
