"""What the ranks of a run owe each other: a common environment, one error message, one end."""

import atexit
import logging
import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist
from deepspeed.comm.comm import mpi_discovery
from torch.distributed import PrefixStore, Store
from torch.distributed.distributed_c10d import _get_default_store, _set_pg_timeout, _world

from agsel.errors import AgselError, UserError, one_line
from agsel.zero.groups import data_parallel_group

MPI_VARIABLES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE")
DEFAULT_PORT = 29500


def join_ranks() -> None:
    """Set the variables by which processes find each other, where `deepspeed` and `torchrun` have not.

    Under `mpirun` they are asked from MPI, with mpi4py; otherwise this process is the only rank.

    Raises:
        UserError: under `mpirun` without mpi4py.
    """
    atexit.register(lambda: remove_shared_memory(os.environ.get("RANK", "")))
    if "RANK" in os.environ:
        return
    if any(name in os.environ for name in MPI_VARIABLES):
        try:
            mpi_discovery(int(os.environ.get("MASTER_PORT", DEFAULT_PORT)), verbose=False)
        except ImportError as error:
            raise UserError("mpirun needs mpi4py: pip install 'agsel[mpi]', or start with `deepspeed`") from error
        return
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        os.environ.setdefault("MASTER_PORT", str(free.getsockname()[1]))
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1")


def remove_shared_memory(rank: int | str) -> None:
    """On the CPU, DeepSpeed's all-reduce leaves 66 MiB of shared memory per rank behind for every port it ever used."""
    address = "_".join(os.environ.get(name, "") for name in ("MASTER_ADDR", "MASTER_PORT"))
    Path(f"/dev/shm/deepspeed_allreduce_buffer_{os.getuid()}_{address}_{rank}").unlink(missing_ok=True)


def limit_waiting(timeout: float) -> None:
    """End collectives that wait longer than `timeout` seconds, in every group of this run that exists now.

    For ranks that all live but wait for each other. The arguments of the Trainer reach only the default group, and on
    the CPU not even that; DeepSpeed's own group would keep torch's 10 minutes, of gloo 30.

    Raises:
        RunError: as of `data_parallel_group`.
    """
    data_parallel_group()  # made now instead of with the engine
    for group in _world.pg_map:
        _set_pg_timeout(timedelta(seconds=timeout), group)


def warn_on_one_rank() -> None:
    """Leave agsel's warnings to the first rank: they are the same on all."""
    if dist.get_rank() > 0:
        logging.getLogger("agsel").setLevel(logging.ERROR)


@contextmanager
def ends_in_one_line() -> Iterator[None]:
    """Print an end that agsel foresaw as one line `agsel: error: ...`, on one rank, and end with exit code 1.

    The first rank to fail prints; the launcher ends the ranks that do not fail themselves. Any other error is a bug or
    a fault, and keeps its traceback.
    """
    try:
        yield
    except AgselError as error:
        if _speaks_for_all():
            say_error(one_line(error))
        sys.exit(1)


def say_error(text: str) -> None:
    """Print one line in one piece: unbuffered, `print` writes the end of the line apart, and ranks share a terminal."""
    sys.stderr.write(f"agsel: error: {text}\n")
    sys.stderr.flush()


def is_first_to_fail(store: Store) -> bool:
    """Whether no rank has asked this before: the first one prints what went wrong, for all."""
    return store.add("agsel/failed", 1) == 1


def _speaks_for_all() -> bool:
    if os.environ.get("WORLD_SIZE", "1") == "1":
        return True
    try:
        return is_first_to_fail(_store())
    except RuntimeError:  # its rank has ended, and has spoken
        return False


def _store() -> Store:
    """That of the run's first process group, without making the group.

    On the CPU, a rank that leaves DeepSpeed's group while another still joins makes that one wait for ever.
    """
    if dist.is_initialized():
        return _get_default_store()
    store, *_ = next(dist.rendezvous("env://"))
    return PrefixStore("default_pg", store)
