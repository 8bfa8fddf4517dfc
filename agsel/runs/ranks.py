"""What the ranks of a run owe each other: a common environment, one error message, one end."""

import atexit
import logging
import os
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from torch.distributed import HashStore, PrefixStore, Store
from torch.distributed.distributed_c10d import _get_default_store, _set_pg_timeout, _world

from agsel.errors import AgselError, MissingError, RunError, UserError, one_line
from agsel.place import is_first_of_host
from agsel.runs.address import Address
from agsel.runs.devices import own_device, require_device_each
from agsel.runs.launchers import set_environment, use_only_device
from agsel.zero.communication import start_process_group
from agsel.zero.groups import data_parallel_group

PATIENCE, LIMIT = 600.0, 1800.0
"""Seconds that ranks wait by default: until they have found each other, and in a collective."""
REFUSED = 2
"""Exit code of what a user's mistake has ended, as of argparse; another start would meet it again."""
TICK = 0.2
"""Seconds between two attempts to reach the first rank."""


class NeverMetError(RunError):
    """The ranks have not found each other: each has to speak for itself."""


def join_ranks(patience: float = PATIENCE, limit: float = LIMIT) -> None:
    """Start torch.distributed over the processes that the launcher has started, or over this one alone.

    Args:
        patience: seconds within which all ranks must have come.
        limit: seconds that a collective may take from then on.

    Raises:
        UserError: a launcher has started several processes that cannot find each other, or that share a GPU.
        NeverMetError: not all ranks have come.
    """
    set_environment(patience)
    atexit.register(lambda: remove_shared_memory(os.environ["RANK"]))
    if dist.is_initialized():
        return
    try:
        _wait_for_store(patience)
        with _known_places(patience):
            start_process_group(timedelta(seconds=patience))
    except (OSError, RuntimeError) as error:
        raise NeverMetError(_why_never_met(error, patience)) from error
    _limit_groups(limit)


def _wait_for_store(patience: float) -> None:
    """Until the first rank can be reached. torch would wait, too, but complain in many lines."""
    if os.environ["RANK"] == "0" or os.environ["WORLD_SIZE"] == "1":
        return
    address, until = (os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])), time.monotonic() + patience
    while True:
        try:
            socket.create_connection(address, timeout=patience).close()
            return
        except OSError:
            if time.monotonic() > until:
                raise
        time.sleep(TICK)


@contextmanager
def _known_places(patience: float) -> Iterator[None]:
    """Set LOCAL_RANK and LOCAL_WORLD_SIZE where the launcher has not, and see that each rank has a GPU, if any has.

    All ranks are asked where they are. Meet them inside: the store's server, perhaps in this process, must go on until
    theirs keeps it.

    Raises:
        UserError: ranks share a GPU.
    """
    rank, size, own = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), Address.own()
    told = {"LOCAL_RANK", "LOCAL_WORLD_SIZE"} <= os.environ.keys()
    on_gpus = get_accelerator().device_name() == "cuda" and size > 1
    if told and not on_gpus:
        yield
        return
    store: Store = HashStore() if size == 1 else _rendezvous(patience)
    store.set_timeout(timedelta(seconds=patience))

    def ask(name: str, answer: str) -> list[str]:
        store.set(f"agsel/{name}/{rank}", answer)
        return [text.decode() for text in store.multi_get([f"agsel/{name}/{other}" for other in range(size)])]

    # NCCL takes ranks with different names in NCCL_HOSTID for those of different hosts.
    hosts = ask("host", f"{own.space} {os.environ.get('NCCL_HOSTID', own.host)}")
    if not told:
        os.environ.setdefault("LOCAL_RANK", str(hosts[:rank].count(hosts[rank])))
        use_only_device()
        os.environ["LOCAL_WORLD_SIZE"] = str(hosts.count(hosts[rank]))
    if on_gpus:
        require_device_each(hosts, ask("device", own_device()))
    yield


def _why_never_met(error: Exception, patience: float) -> str:
    rank, size, *address = (os.environ.get(name, "?") for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"))
    place = ":".join(address)
    if "EADDRINUSE" in str(error):
        return f"{place} is taken, perhaps by another run: choose another port (--master_port of the launcher)"
    return (
        f"rank {rank} of {size} has not met the others at {place} within {patience:g} s (--rank_timeout): look at what "
        f"they say, and whether their hosts reach that address ({one_line(error)})"
    )


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
    _limit_groups(timeout)


def _limit_groups(timeout: float) -> None:
    for group in _world.pg_map:
        _set_pg_timeout(timedelta(seconds=timeout), group)


def warn_on_one_rank() -> None:
    """Leave agsel's warnings to the first rank: they are the same on all."""
    if dist.get_rank() > 0:
        logging.getLogger("agsel").setLevel(logging.ERROR)


@contextmanager
def ends_in_one_line() -> Iterator[None]:
    """Print an end that agsel foresaw as one line `agsel: error: ...`, on one rank, and end with an exit code.

    That is `REFUSED` for a user's mistake, and 1 for all else.

    The first rank to fail prints; the launcher ends the ranks that do not fail themselves. Any other error is a bug or
    a fault, and keeps its traceback.
    """
    try:
        yield
    except AgselError as error:
        if isinstance(error, NeverMetError) or _speaks_for_all():
            say_error(one_line(error))
        sys.exit(REFUSED if isinstance(error, UserError | MissingError) else 1)


def say_error(text: str) -> None:
    """Print one line in one piece: unbuffered, `print` writes the end of the line apart, and ranks share a terminal."""
    sys.stderr.write(f"agsel: error: {text}\n")
    sys.stderr.flush()


def is_first_to_fail(store: Store) -> bool:
    """Whether no rank has asked this before: the first one prints what went wrong, for all."""
    return store.add("agsel/failed", 1) == 1


def _speaks_for_all() -> bool:
    if os.environ.get("WORLD_SIZE") == "1":
        return True
    if not dist.is_initialized() and not _can_meet():
        return is_first_of_host()
    try:
        return is_first_to_fail(_store())
    except RuntimeError:  # its rank has ended, and has spoken
        return False


def _can_meet() -> bool:
    return all(name in os.environ for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"))


def _store() -> Store:
    """That of the run's first process group, without making the group.

    On the CPU, a rank that leaves DeepSpeed's group while another still joins makes that one wait for ever.
    """
    if dist.is_initialized():
        return _get_default_store()
    return PrefixStore("default_pg", _rendezvous())


def _rendezvous(patience: float = PATIENCE) -> Store:
    store, *_ = next(dist.rendezvous("env://", timeout=timedelta(seconds=patience)))
    return store
