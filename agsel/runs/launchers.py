"""Who started this process, and as one of how many: what launchers say in the environment.

`deepspeed`, `torchrun` and `accelerate launch` say it as RANK and WORLD_SIZE. These have the last word, as the launcher
that sets them is nearer to the process than one that started the launcher. MPI and Slurm have words of their own.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

from deepspeed.accelerator import get_accelerator

from agsel.errors import UserError
from agsel.place import PLACE
from agsel.runs.mpi import meet
from agsel.runs.slurm import join_step

PMIX = "PMIX_RANK"
"""Set beside those of Open MPI and Slurm. Alone it tells that there may be others, but not how many."""
REMEDY = (
    "use `deepspeed`, `srun` or `sbatch launch/train.sbatch`, or set RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and "
    "MASTER_PORT; for a run of its own in every process, set RANK=0 LOCAL_RANK=0 WORLD_SIZE=1"
)


@dataclass(frozen=True)
class Launcher:
    """The variables that a launcher sets in each process.

    Attributes:
        name: in a sentence.
        rank: of the process.
        size: number of processes.
        local_rank: place of the process among those of its host.
        local_size: number of processes of its host, if there is one.
        abi: which MPI the processes find each other with, as mpi4py calls it, if they do.
    """

    name: str
    rank: str
    size: str
    local_rank: str
    local_size: str = ""
    abi: str | None = None


LAUNCHERS = (
    Launcher(
        "Open MPI",
        "OMPI_COMM_WORLD_RANK",
        "OMPI_COMM_WORLD_SIZE",
        "OMPI_COMM_WORLD_LOCAL_RANK",
        "OMPI_COMM_WORLD_LOCAL_SIZE",
        abi="openmpi",
    ),
    Launcher(
        "MVAPICH",
        "MV2_COMM_WORLD_RANK",
        "MV2_COMM_WORLD_SIZE",
        "MV2_COMM_WORLD_LOCAL_RANK",
        "MV2_COMM_WORLD_LOCAL_SIZE",
        abi="mpich",
    ),
    Launcher("MPICH or Intel MPI", "PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS", abi="mpich"),
    # A step is what `srun` starts. SLURM_NTASKS is of the job, where without `srun` one process is one run.
    Launcher("srun", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID"),
)
"""Those inside others first: in a Slurm job, `mpirun` starts its own helpers with `srun`."""
SRUN = LAUNCHERS[-1]


def set_environment(patience: float) -> None:
    """Set the variables by which processes find each other, where a launcher has not. Without one this is the only one.

    Args:
        patience: seconds within which all processes must have come.

    Raises:
        RunError: they have not.
        UserError: a launcher has started several processes that cannot find each other, or what it says is incomplete.
    """
    if "RANK" in os.environ:
        _require_complete()
        if local_size := os.environ.get("LOCAL_SIZE"):  # of `deepspeed`
            os.environ["LOCAL_WORLD_SIZE"] = local_size
    elif (launcher := _launcher()) is not None:
        _join(launcher, _number(launcher.size), patience)
    elif _number("WORLD_SIZE") > 1:
        raise UserError(f"WORLD_SIZE is {_number('WORLD_SIZE')}, but RANK is not set: {REMEDY}")
    else:
        os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", LOCAL_WORLD_SIZE="1")
    use_only_device()


def use_only_device() -> None:
    """Of a process that sees one device, as of `srun --gpus-per-task=1`, that is the first, whatever its place."""
    accelerator = get_accelerator()
    place = os.environ.get("LOCAL_RANK", "0")
    if place != "0" and accelerator.device_name() != "cpu" and accelerator.device_count() == 1:
        os.environ[PLACE] = place
        for name in {"LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_RANK"} & {*os.environ}:  # which DeepSpeed wants to be equal
            os.environ[name] = "0"


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
    told = launcher.local_rank in os.environ or launcher is SRUN or SRUN.size not in os.environ
    return launcher.size in os.environ and told


def _join(launcher: Launcher, size: int, patience: float) -> None:
    started = f"{launcher.name} has started {size} processes"
    if _number("WORLD_SIZE", size) != size:
        raise UserError(f"WORLD_SIZE is {_number('WORLD_SIZE')}, but {started}: unset it")
    if launcher.abi is None:
        join_step(started)
        return
    rank = _number(launcher.rank)
    if not {"MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys():
        os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"] = meet(started, rank, size, launcher.abi, patience)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(size))
    for common, own in (("LOCAL_RANK", launcher.local_rank), ("LOCAL_WORLD_SIZE", launcher.local_size)):
        if own in os.environ:
            os.environ[common] = os.environ[own]


def _number(name: str, default: int = 1) -> int:
    text = os.environ.get(name, str(default))
    if not text.isdigit():
        raise UserError(f"{name} is {text!r}, which is no number: set it as the launcher should have done")
    return int(text)
