"""Checkpoint folders that are complete or absent: written aside, sealed with a manifest, then renamed into place.

A `checkpoint-N` folder counts only with a `manifest.json` that matches every file in it by size and SHA-256. So a run
that is killed, or whose disk fills, while it saves leaves the checkpoints before it as they were.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist

from agsel.errors import UserError
from agsel.monitor.progress import Progress
from agsel.zero.consensus import gather

logger = logging.getLogger("agsel")

MANIFEST = "manifest.json"
PIECE = 1 << 24
"""Bytes of a file read at once."""
STAGING = ".saving"
"""Folder inside the run folder for checkpoints that are being written, replaced or deleted."""
PREFIX = "checkpoint-"
ABANDONED = "abandoned-"
"""Folders inside the run folder, numbered, for checkpoints of steps that the run does once more."""
PROBE = 2**20
"""Bytes that must fit on a disk that is not full."""


@dataclass(frozen=True)
class Manifest:
    """What a complete checkpoint holds.

    Attributes:
        run: what the run was like, for comparison with the run that resumes it.
        files: size in bytes and SHA-256 of every file, by its path within the folder.
    """

    run: dict[str, Any]
    files: dict[str, tuple[int, str]]

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """The manifest of a checkpoint.

        Raises:
            UserError: there is none, it is no manifest, or it is not as it was written.
        """
        try:
            fields = json.loads((folder / MANIFEST).read_text())
            sealed = fields.pop("sha256") == _seal(fields)
            manifest = cls(fields["run"], {name: (size, digest) for name, (size, digest) in fields["files"].items()})
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"it has no readable {MANIFEST}: it was never completed, or is damaged") from error
        if not sealed:
            raise UserError(f"{MANIFEST} is not what was saved")
        return manifest

    def write(self, folder: Path) -> None:
        """Complete a checkpoint."""
        fields = {"run": self.run, "files": self.files}
        _write_durably(folder / MANIFEST, json.dumps(fields | {"sha256": _seal(fields)}, indent=1))


def _seal(fields: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()


@contextmanager
def saving(run_folder: Path, step: int, run: dict[str, Any], group: Any) -> Iterator[Path]:
    """A folder to write the checkpoint of a step into, which takes its name once it is complete. On every rank.

    Args:
        run_folder: that holds the checkpoints; shared by all hosts.
        step: optimizer steps done.
        run: for the manifest.
        group: process group of all ranks, on the host.

    Raises:
        OSError: the checkpoint cannot be written.
    """
    staged, final = run_folder / STAGING / f"{PREFIX}{step}", run_folder / f"{PREFIX}{step}"
    first = dist.get_rank(group) == 0
    if first:
        shutil.rmtree(staged, ignore_errors=True)
        staged.mkdir(parents=True)
    dist.barrier(group)
    yield staged
    dist.barrier(group)
    files = _digests(staged, group)
    if first:
        Manifest(run, files).write(staged)
        _sync_folders(staged)
        _put_in_place(staged, final)
    dist.barrier(group)


def newest_complete(run_folder: Path, group: Any) -> Path | None:
    """The checkpoint of the latest step that is whole, with a warning for each later one that is not. On every rank."""
    for folder in reversed(gather(checkpoints_in(run_folder), group)[0]):
        reason = damage(folder, group)
        if reason is None:
            return folder
        logger.warning("%s is skipped: %s", folder, reason)
    return None


def checkpoints_in(run_folder: Path) -> list[Path]:
    """Its checkpoint folders by step, whole or not."""
    steps = {folder: folder.name.removeprefix(PREFIX) for folder in run_folder.glob(f"{PREFIX}*")}
    return sorted((folder for folder, step in steps.items() if step.isdecimal()), key=lambda folder: int(steps[folder]))


def damage(folder: Path, group: Any) -> str | None:
    """Why a checkpoint cannot be used, None if every file is as it was saved. On every rank: they share the work."""
    missing = gather(missing_part(folder), group)[0]
    if missing is not None:
        return missing
    now = _digests(folder, group)
    differing = [name for name, file in Manifest.read(folder).files.items() if now[name] != file]
    return f"{differing[0]} is not what was saved" if differing else None


def missing_part(folder: Path) -> str | None:
    """Why a checkpoint is not complete, None if all its files are there with their sizes; their content is not read."""
    try:
        files = Manifest.read(folder).files
    except ValueError as error:
        return str(error)
    for name, (size, _) in files.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} bytes instead of {size}"
    return None


def set_aside_later(run_folder: Path, step: int) -> str | None:
    """Move checkpoints of later steps than that which the run goes on from out of the way, into a new folder.

    Else a run that stops before it has come as far would go on from them. Returns what was done, if anything.
    """
    later = [folder for folder in checkpoints_in(run_folder) if int(folder.name.removeprefix(PREFIX)) > step]
    if not later:
        return None
    folders = (run_folder / f"{ABANDONED}{number}" for number in itertools.count(1))
    aside = next(folder for folder in folders if not folder.exists())
    aside.mkdir()
    for folder in later:
        folder.rename(aside / folder.name)
    names = ", ".join(folder.name for folder in later)
    return f"{names}: of what came after step {step} before, moved into {aside.name}/"


def rotate(run_folder: Path, keep: int | None, *protected: Path) -> None:
    """Delete all but the newest `keep` complete checkpoints. Incomplete ones are left alone and do not count.

    Args:
        run_folder: that holds the checkpoints.
        keep: how many, at least one; None, 0 or less for all.
        protected: more that stay.
    """
    if keep is None or keep <= 0:
        return
    complete = [folder for folder in checkpoints_in(run_folder) if missing_part(folder) is None]
    staying = {folder.resolve() for folder in protected}
    for folder in complete[:-keep]:
        if folder.resolve() not in staying:
            _discard(folder)


def recover(run_folder: Path) -> None:
    """After a run that was killed: put back a checkpoint that was being replaced, and clear what was half done."""
    for old in (run_folder / STAGING).glob(f"old-{PREFIX}*"):
        final = run_folder / old.name.removeprefix("old-")
        if not final.exists() and missing_part(old) is None:
            old.rename(final)
    shutil.rmtree(run_folder / STAGING, ignore_errors=True)


def fault_of_disk(folder: Path, error: Exception) -> str | None:
    """What a disk has to do with a failed write into a folder, and the room that is left; None for nothing."""
    reason = complaint_of_disk(folder) or (str(error) if isinstance(error, OSError) else None)
    return reason and f"{reason}; {shutil.disk_usage(folder).free / 1e9:.2f} GB free there"


def complaint_of_disk(folder: Path) -> str | None:
    """What prevents writing into a folder, None if nothing does. torch calls a full disk an unexpected position."""
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(PROBE))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        return error.strerror
    return None


def _digests(folder: Path, group: Any) -> dict[str, tuple[int, str]]:
    """Size and SHA-256 of every file but the manifest, each brought to the disk on the way. Ranks share the work."""
    names = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    names = [name for name in gather(names, group)[0] if name != MANIFEST]
    own_names = names[dist.get_rank(group) :: dist.get_world_size(group)]
    total = sum((folder / name).stat().st_size for name in own_names)
    with Progress(f"checksums of {folder.name}", total, shown=dist.get_rank(group) == 0) as progress:
        own = {name: _digest(folder / name, progress) for name in own_names}
    digests: dict[str, tuple[int, str]] = {}
    for of_rank in gather(own, group):
        digests |= of_rank
    return {name: digests[name] for name in names}


def _digest(path: Path, progress: Progress) -> tuple[int, str]:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(PIECE):
            digest.update(piece)
            progress.advance(len(piece))
        os.fsync(file.fileno())
        return os.fstat(file.fileno()).st_size, digest.hexdigest()


def _put_in_place(staged: Path, final: Path) -> None:
    """Give a staged checkpoint its name. One of the same name goes aside first, from where `recover` would fetch it."""
    old = staged.with_name(f"old-{final.name}")
    if final.exists():
        shutil.rmtree(old, ignore_errors=True)
        final.rename(old)
    staged.rename(final)
    _sync_folder(final.parent)
    shutil.rmtree(staged.parent, ignore_errors=True)


def _discard(folder: Path) -> None:
    """Delete a folder that must not be seen half deleted."""
    doomed = folder.parent / STAGING / f"deleted-{folder.name}"
    doomed.parent.mkdir(exist_ok=True)
    folder.rename(doomed)
    shutil.rmtree(doomed.parent, ignore_errors=True)


def _write_durably(path: Path, text: str) -> None:
    with path.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _sync_folders(top: Path) -> None:
    for folder in (top, *(path for path in top.rglob("*") if path.is_dir())):
        _sync_folder(folder)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
