"""The page: `page.html.jinja` filled with the words and pictures of one run, or of several."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from agsel.errors import UserError
from agsel.monitor import SelectionHistory, pictures
from agsel.monitor.progress import Progress
from agsel.replacing import replace_file
from agsel.report import charts, telling, wording
from agsel.report.embedding import Embedded, Picture, embed
from agsel.report.final_numbers import final_numbers, training_seconds
from agsel.report.run_files import Run, read_runs
from agsel.runs.folder import REPORT

MARK = '<meta name="generator" content="agsel">'
"""Of a page, by which it is known where another one takes its place."""
WIDE, NARROW = 10.0, 4.4
"""Inches of the maps."""
STEPS = "optimizer step"


def write_report(folders: Sequence[Path], output: Path) -> None:
    """Write the page of one run, or the comparison of several.

    Args:
        folders: of the runs; the others are compared to the first one.
        output: the file, complete or not written.

    Raises:
        UserError: a folder does not hold a run, or the file cannot be written.
    """
    runs = read_runs(folders)
    page = _render(runs, *_sections(runs))
    try:
        replace_file(output, page)
    except OSError as error:
        raise UserError(f"cannot write {output} (--output): {error.strerror}") from error


def require_place(output: Path) -> None:
    """Refuse a file that is not to be written, before seconds are spent on drawing.

    Raises:
        UserError: its folder is not there, or something else than a report has its name.
    """
    if not output.parent.is_dir():
        raise UserError(f"cannot write {output} (--output): there is no folder {output.parent}")
    if output.is_dir():
        raise UserError(f"cannot write {output} (--output): it is a folder, name a file in it")
    if output.is_file() and MARK not in output.read_text(encoding="utf-8", errors="replace")[:1000]:
        raise UserError(f"{output} (--output) is no report, and would be overwritten: choose another file")


def _sections(runs: Sequence[Run]) -> tuple[list[Embedded], ...]:
    """Pictures, drawn: curves, and of the selection or of what was gained and spent."""
    if len(runs) == 1:
        sections = [list(_curves_of_run(runs[0])), list(_selection_of_run(runs[0]))]
    else:
        sections = [list(_curves_of_runs(runs)), list(_trades(runs))]
    drawings = sum(picture.drawings for section in sections for picture in section)
    with Progress(f"writing {REPORT}", drawings) as progress:
        return tuple([embed(picture, progress.advance) for picture in section] for section in sections)


def _render(runs: Sequence[Run], curves: list[Embedded], others: list[Embedded]) -> str:
    templates = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    templates.filters |= {"size": wording.size, "moment": wording.moment}
    content = _of_run(runs[0]) if len(runs) == 1 else _of_runs(runs)
    return templates.get_template("page.html.jinja").render(
        runs=runs,
        final=telling.final_table(runs, final_numbers(runs)),
        curves=curves,
        others=others,
        made=datetime.now(UTC),
        mark=MARK,
        telling=telling,
        **content,
    )


def _of_run(run: Run) -> dict[str, Any]:
    return {
        "title": telling.title_of(run),
        "main": telling.facts(run.configuration, telling.MAIN_SETTINGS),
        "settings": telling.facts(run.configuration),
        "environment": telling.facts(run.environment),
        "result": telling.facts(run.result),
    }


def _of_runs(runs: Sequence[Run]) -> dict[str, Any]:
    return {
        "title": f"{len(runs)} runs compared",
        "settings": telling.differing([run.configuration for run in runs], telling.OF_THE_FOLDER),
        "environment": telling.differing([run.environment for run in runs], telling.OF_THE_START),
    }


def _curves_of_run(run: Run) -> Iterator[Picture]:
    for subject in charts.subjects_of([run]):
        lines = charts.lines_of_run(run, subject)
        if lines:
            said = f"{charts.describe_lines(lines, subject.unit)}, over {run.steps:,} steps"
            yield Picture(subject.title, said, partial(charts.draw_lines, lines, subject, STEPS))


def _curves_of_runs(runs: Sequence[Run]) -> Iterator[Picture]:
    unit, scale = charts.time_unit(max(training_seconds(run) or 0 for run in runs))
    axes = {"step": ("steps", STEPS, 1.0), "seconds": ("training time", f"training time, {unit}", scale)}
    for subject in charts.subjects_of(runs):
        for called in subject.compared:
            title = f"{subject.title}, {called}" if len(subject.compared) > 1 else subject.title
            for over, (word, axis, divisor) in axes.items():
                lines = charts.lines_of_runs(runs, subject.names[called], over)
                if any(line.x.size for line in lines):
                    said = f"{charts.describe_lines(lines, subject.unit)}, over {word}"
                    draw = partial(charts.draw_lines, lines, subject, axis, scale=divisor)
                    yield Picture(f"{title}, over {word}", said, draw)


def _trades(runs: Sequence[Run]) -> Iterator[Picture]:
    for trade in charts.trades_of(runs):
        title = f"{trade.result[0].upper()}{trade.result[1:]} against {trade.cost.partition(',')[0]}"
        yield Picture(title, charts.describe_trade(trade), partial(charts.draw_trade, trade))


def _selection_of_run(run: Run) -> Iterator[Picture]:
    if run.history:
        said = f"Which blocks were trained in each of {len(run.history.steps):,} steps. {_describe_counts(run.counts)}"
        yield _map("Trained blocks", said, partial(pictures.selection_map, run.history))
        yield _map("Gradient norms", _describe_norms(run.history), partial(pictures.norm_map, run.history))
    if run.counts:
        yield _map("Steps by depth", _describe_counts(run.counts), partial(pictures.bars_of, run.counts))


def _map(title: str, said: str, draw: Any) -> Picture:
    return Picture(title, said, draw, (WIDE, NARROW))


def _describe_counts(counts: Mapping[str, int]) -> str:
    most, least = max(counts, key=counts.__getitem__), min(counts, key=counts.__getitem__)
    return f"Most often {most}, in {counts[most]:,} steps; least often {least}, in {counts[least]:,}"


def _describe_norms(history: SelectionHistory) -> str:
    known = history.measured()
    known = known[np.isfinite(known)]
    if not known.size:
        return "No gradient norm of a block was measured"
    low, high = wording.number(float(known.min())), wording.number(float(known.max()))
    return f"Gradient norms of the blocks, from {low} to {high}"
