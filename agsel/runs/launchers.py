"""Who started this process, and as one of how many: what launchers say in the environment.

`deepspeed`, `torchrun` and `accelerate launch` say it as RANK and WORLD_SIZE. These have the last word, as the launcher
that sets them is nearer to the process than one that started the launcher. MPI and Slurm have words of their own.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

from deepspeed.accelerator import get_accelerator
from deepspeed.comm.comm import mpi_discovery

from agsel.errors import UserError, one_line
from agsel.runs.slurm import join_step

DEFAULT_PORT = 29500
"""Of the ranks under MPI, if MASTER_PORT names no other."""
REMEDY = (
    "use `deepspeed`, `srun` or `sbatch launch/train.sbatch`, or set RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and "
    "MASTER_PORT; for a run of its own in every process, set RANK=0 LOCAL_RANK=0 WORLD_SIZE=1"
)


@dataclass(frozen=True)
class Launcher:
    """What a launcher sets in the environment of each process.

    Attributes:
        name: in a sentence.
        size: variable with the number of processes.
        place: variable with the place of the process among those of its host.
        has_mpi: whether the processes find each other with MPI.
    """

    name: str
    size: str
    place: str
    has_mpi: bool = True


LAUNCHERS = (
    Launcher("Open MPI", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"),
    Launcher("MVAPICH", "MV2_COMM_WORLD_SIZE", "MV2_COMM_WORLD_LOCAL_RANK"),
    Launcher("MPICH or Intel MPI", "PMI_SIZE", "MPI_LOCALRANKID"),
    # A step is what `srun` starts. SLURM_NTASKS is of the job, where without `srun` one process is one run.
    Launcher("srun", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", has_mpi=False),
)
"""Those inside others first: in a Slurm job, `mpirun` starts its own helpers with `srun`."""
SRUN = LAUNCHERS[-1]
PMIX = "PMIX_RANK"
"""Set beside those of Open MPI and Slurm. Alone it tells that there may be others, but not how many."""
PLACE = "AGSEL_PLACE_ON_HOST"
"""Of a process whose LOCAL_RANK says which device it uses instead."""


def set_environment() -> None:
    """Set the variables by which processes find each other, where a launcher has not. Without one this is the only one.

    Raises:
        UserError: a launcher has started several processes that cannot find each other, or what it says is incomplete.
    """
    if "RANK" in os.environ:
        _require_complete()
    elif (launcher := _launcher()) is not None:
        _join(launcher, _number(launcher.size))
    elif _number("WORLD_SIZE") > 1:
        raise UserError(f"WORLD_SIZE is {_number('WORLD_SIZE')}, but RANK is not set: {REMEDY}")
    else:
        os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1")
    _use_only_device()


def is_first_of_host() -> bool:
    """Whether this process speaks for those that the launcher has started beside it."""
    places = (PLACE, "LOCAL_RANK", *(launcher.place for launcher in LAUNCHERS), PMIX)
    return next((os.environ[place] for place in places if place in os.environ), "0") == "0"


def _require_complete() -> None:
    needed = ("WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") if _number("WORLD_SIZE") > 1 else ("WORLD_SIZE",)
    missing = [name for name in needed if name not in os.environ]
    if missing:
        raise UserError(f"RANK is set, but not {' and '.join(missing)}: {REMEDY}")


def _launcher() -> Launcher | None:
    """The one that has started this process beside others."""
    known = next(filter(_has_started_this, LAUNCHERS), None)
    if known is None and PMIX in os.environ:
        raise UserError(f"PMIx has started this process, perhaps beside others that it cannot find: {REMEDY}")
    return known if known is not None and _number(known.size) > 1 else None


def _has_started_this(launcher: Launcher) -> bool:
    """The size alone is not enough where there is `srun`, whose `--mpi=pmi2` says PMI_SIZE too."""
    told = launcher.place in os.environ or launcher is SRUN or SRUN.size not in os.environ
    return launcher.size in os.environ and told


def _join(launcher: Launcher, size: int) -> None:
    started = f"{launcher.name} has started {size} processes"
    if _number("WORLD_SIZE", size) != size:
        raise UserError(f"WORLD_SIZE is {_number('WORLD_SIZE')}, but {started}: unset it")
    if not launcher.has_mpi:
        join_step(started)
        return
    found = _size_by_mpi(started)
    if found != size:
        raise UserError(
            f"{started}, but mpi4py knows of {found}: it belongs to another MPI; pip install --force-reinstall "
            "--no-binary mpi4py mpi4py, with mpicc of this one in PATH, or start with `deepspeed`"
        )
    mpi_discovery(_number("MASTER_PORT", DEFAULT_PORT), verbose=False)


def _size_by_mpi(started: str) -> int:
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:  # a RuntimeError if mpi4py is there, but not the MPI library
        raise UserError(
            f"{started}, which need mpi4py to find each other, but: {one_line(error)}; pip install 'agsel[mpi]' beside "
            "this MPI, or start with `deepspeed`"
        ) from error
    return MPI.COMM_WORLD.Get_size()


def _use_only_device() -> None:
    """Of a process that sees one device, as of `srun --gpus-per-task=1`, that is the first, whatever its place."""
    accelerator = get_accelerator()
    place = os.environ.get("LOCAL_RANK", "0")
    if place != "0" and accelerator.device_name() != "cpu" and accelerator.device_count() == 1:
        os.environ[PLACE] = place
        for name in {"LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_RANK"} & {*os.environ}:  # which DeepSpeed wants to be equal
            os.environ[name] = "0"


def _number(name: str, default: int = 1) -> int:
    text = os.environ.get(name, str(default))
    if not text.isdigit():
        raise UserError(f"{name} is {text!r}, which is no number: set it as the launcher should have done")
    return int(text)
