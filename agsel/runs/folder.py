"""The run folder: can be written, belongs to this run, and which of its checkpoints the run goes on from."""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from agsel.errors import UserError
from agsel.monitor import METRICS, SELECTION, STARTS
from agsel.runs import checkpoints, resume
from agsel.zero.consensus import first_rank_does

SETTINGS, ABOUT_SETTINGS = "config.yaml", "# every setting of this run; use it again with --config\n"
"""The file that tells the folder of a run, and how it begins."""
WRITTEN = ("environment.json", METRICS, SELECTION, STARTS, "selection.json", "result.json", "report.html")
"""What every run writes beside it, and would overwrite."""


def prepare(run_folder: Path, wanted: str | None, outputs: Sequence[str], group: Any) -> Path | None:
    """Mend the folder, or refuse it, and return the checkpoint to go on from, verified. Every rank must call it.

    Args:
        run_folder: of this run.
        wanted: as `agsel.runs.resume.find_checkpoint` takes it.
        outputs: what this run writes there in the end beside what every run does.
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
    """Refuse a folder where a run would overwrite what is of no run."""
    found = next((name for name in (SETTINGS, *WRITTEN, *outputs) if (run_folder / name).exists()), None)
    if found == SETTINGS:
        settings = run_folder / SETTINGS
        is_of_run = settings.is_file() and settings.read_text(errors="replace").startswith(ABOUT_SETTINGS)
    else:
        is_of_run = bool(checkpoints.checkpoints_in(run_folder))
    if found is not None and not is_of_run:
        raise UserError(
            f"{run_folder} (--output_dir) holds {found}, which is of no run and would be overwritten: choose another "
            "folder, or move it away"
        )


def require_no_earlier_run(run_folder: Path) -> None:
    """Refuse a run in the folder of another: it would resume from its checkpoints, delete them or its model."""
    earlier = checkpoints.checkpoints_in(run_folder)
    if earlier:
        raise UserError(
            f"{run_folder} (--output_dir) holds {earlier[-1].name} of an earlier run: go on with that "
            "(--resume_from_checkpoint auto), or choose another folder"
        )
    if (run_folder / "model").exists():
        raise UserError(
            f"{run_folder} (--output_dir) holds the model of an earlier run: choose another folder, or move model/ away"
        )
