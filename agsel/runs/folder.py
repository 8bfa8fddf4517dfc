"""The run folder: can be written, belongs to this run, and which of its checkpoints the run goes on from."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from agsel.errors import UserError
from agsel.monitor import METRICS, SELECTION, STARTS
from agsel.runs import checkpoints, resume
from agsel.zero.consensus import first_rank_does

SETTINGS, ABOUT_SETTINGS = "config.yaml", "# every setting of this run; use it again with --config\n"
"""The file that tells the folder of a run, and how it begins."""
WRITTEN = (SETTINGS, "environment.json", METRICS, SELECTION, STARTS, "selection.json", "result.json")
"""What every run writes, and would overwrite."""
OUTPUTS = MODEL, MERGED, FILE_OF_ELEMENTS, REPORT = "model/", "merged/", "elements.safetensors", "report.html"
"""What a run may leave in the end beside that, folders with a slash."""


def outputs_of(settings: Mapping[str, Any]) -> list[str]:
    """Those of `OUTPUTS` that a run with these settings leaves."""
    wanted = {
        MODEL: True,
        MERGED: settings.get("merge_adapter"),
        FILE_OF_ELEMENTS: settings.get("elements"),
        REPORT: settings.get("report"),
    }
    return [name for name in OUTPUTS if wanted[name]]


def prepare(run_folder: Path, wanted: str | None, outputs: Sequence[str], group: Any) -> Path | None:
    """Mend the folder, or refuse it, and return the checkpoint to go on from, verified. Every rank must call it.

    Args:
        run_folder: of this run.
        wanted: as `agsel.runs.resume.find_checkpoint` takes it.
        outputs: of this run, by `outputs_of`.
        group: process group of all ranks, on the host.

    Raises:
        UserError: the folder holds another run or files of others, or there is no such checkpoint.
    """
    first_rank_does(partial(checkpoints.recover, run_folder), group)
    if wanted is None or (wanted not in resume.NEWEST and not _is_in(Path(wanted), run_folder)):
        first_rank_does(partial(require_no_earlier_run, run_folder), group)
    first_rank_does(partial(require_no_files_of_others, run_folder, outputs), group)
    return resume.find_checkpoint(wanted, run_folder, group)


def _is_in(checkpoint: Path, run_folder: Path) -> bool:
    return checkpoint.resolve().parent == run_folder.resolve()


def make_run_folder(run_folder: Path) -> None:
    """Refuse a folder that cannot be written before anything is loaded."""
    try:
        run_folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make the run folder (--output_dir), {error}: choose another") from error
    if not os.access(run_folder, os.W_OK):
        raise UserError(f"cannot write to the run folder {run_folder} (--output_dir): choose another")


def require_no_files_of_others(run_folder: Path, outputs: Sequence[str]) -> None:
    """Refuse a folder where a run would overwrite what is of no run, or could not replace what is there."""
    own = _outputs_of_earlier_run(run_folder)
    if own is None:
        others = [*WRITTEN, *outputs, *(checkpoint.name for checkpoint in checkpoints.checkpoints_in(run_folder))]
    else:
        others = [name for name in outputs if name not in own]
    found = next((name for name in others if os.path.lexists(run_folder / name)), None)
    if found is not None:
        raise UserError(
            f"{run_folder} (--output_dir) holds {found}, which is of no run and would be overwritten: choose another "
            "folder, or move it away"
        )
    for name in outputs:
        path, kind = run_folder / name, "folder" if name.endswith("/") else "file"
        if os.path.lexists(path) and (path.is_symlink() or path.is_dir() != (kind == "folder")):
            raise UserError(f"{path} is no {kind}, which the run has to write there (--output_dir): move it away")


def _outputs_of_earlier_run(run_folder: Path) -> Sequence[str] | None:
    """By the settings of the run whose folder it is, any if its checkpoints alone tell of it; None of no run."""
    try:
        written = (run_folder / SETTINGS).read_text(encoding="utf-8")
        settings = yaml.safe_load(written) if written.startswith(ABOUT_SETTINGS) else None
    except (OSError, ValueError, yaml.YAMLError):
        settings = None
    if isinstance(settings, dict):
        return outputs_of(settings)
    saved = checkpoints.checkpoints_in(run_folder)
    return OUTPUTS if any((checkpoint / checkpoints.MANIFEST).is_file() for checkpoint in saved) else None


def require_no_earlier_run(run_folder: Path) -> None:
    """Refuse a run in the folder of another: it would resume from its checkpoints, delete them or its model."""
    earlier = checkpoints.checkpoints_in(run_folder)
    if earlier:
        raise UserError(
            f"{run_folder} (--output_dir) holds {earlier[-1].name} of an earlier run: go on with that "
            "(--resume_from_checkpoint auto), or choose another folder"
        )
    outputs = _outputs_of_earlier_run(run_folder) or [MODEL]
    left = [name for name in outputs if name != REPORT and (run_folder / name).exists()]  # a report may come any time
    if left:
        raise UserError(
            f"{run_folder} (--output_dir) holds {' and '.join(left)} of an earlier run: choose another folder"
        )
