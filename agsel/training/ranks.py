"""What the ranks of a run owe each other: a common environment, equal settings, one error message, one end."""

import atexit
import os
import socket
import sys
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import deepspeed
import torch.distributed as dist
from deepspeed.comm.comm import mpi_discovery
from torch.distributed.distributed_c10d import _get_default_store

MPI_VARIABLES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE")
DEFAULT_PORT = 29500


def join_ranks() -> None:
    """Set the variables by which processes find each other, where `deepspeed` and `torchrun` have not.

    Under `mpirun` they are asked from MPI, with mpi4py; otherwise this process is the only rank.

    Raises:
        ValueError: under `mpirun` without mpi4py.
    """
    atexit.register(_remove_shared_memory)
    if "RANK" in os.environ:
        return
    if any(name in os.environ for name in MPI_VARIABLES):
        try:
            mpi_discovery(int(os.environ.get("MASTER_PORT", DEFAULT_PORT)), verbose=False)
        except ImportError as error:
            raise ValueError("mpirun needs mpi4py: pip install 'agsel[mpi]', or start with `deepspeed`") from error
        return
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        os.environ.setdefault("MASTER_PORT", str(free.getsockname()[1]))
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1")


def _remove_shared_memory() -> None:
    """On the CPU, DeepSpeed's all-reduce leaves 66 MiB of shared memory per rank behind for every port it ever used."""
    address = "_".join(os.environ.get(name, "") for name in ("MASTER_ADDR", "MASTER_PORT", "RANK"))
    Path(f"/dev/shm/deepspeed_allreduce_buffer_{os.getuid()}_{address}").unlink(missing_ok=True)


def require_same_settings(settings: Mapping[str, Any]) -> None:
    """Refuse ranks that were started with different settings. Every rank calls it, and every rank gets the error.

    Raises:
        ValueError: names each setting that differs, with its values.
    """
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, dict(settings))
    names = sorted(set().union(*everyone))
    differing = {name: [theirs.get(name) for theirs in everyone] for name in names}
    differing = {name: values for name, values in differing.items() if any(value != values[0] for value in values)}
    if differing:
        details = "; ".join(f"{name} is {' and '.join(map(repr, values))}" for name, values in differing.items())
        raise ValueError(f"the ranks have different settings: {details}; start every rank with the same command")


@contextmanager
def mistakes_in_one_line(*, only_of_agsel: bool = False) -> Iterator[None]:
    """Print a user's mistake as one line `agsel: error: ...`, on one rank, and end this process with exit code 1.

    The first rank to fail prints; the launcher ends the ranks that do not fail themselves.

    Args:
        only_of_agsel: take for mistakes only what agsel itself raises. While training, any other error is a fault,
            and keeps its traceback.
    """
    try:
        yield
    except (ValueError, OSError, RuntimeError) as error:
        if not (_raised_by_agsel(error) if only_of_agsel else isinstance(error, (ValueError, OSError))):
            raise
        if _is_first_to_fail():
            print(f"agsel: error: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
        sys.exit(1)


def _raised_by_agsel(error: BaseException) -> bool:
    *_, (innermost, _) = traceback.walk_tb(error.__traceback__)
    return innermost.f_globals.get("__name__", "").split(".")[0] == "agsel"


def _is_first_to_fail() -> bool:
    if os.environ.get("WORLD_SIZE", "1") == "1":
        return True
    if not dist.is_initialized():
        deepspeed.init_distributed(auto_mpi_discovery=False, verbose=False)
    return _get_default_store().add("agsel/failed", 1) == 1
