"""Where the first of the processes that MPI has started can be reached: it tells the others, once.

MPICH's `mpirun`, from which those of Intel and others descend, carries such messages itself. Its protocol, a few lines
of text, needs no library, so it does not matter which MPI an mpi4py belongs to. For Open MPI it takes mpi4py.
From then on torch's store is used, and MPI no more: a process that it does not wait for may end in any way.
"""

from __future__ import annotations

import os
import select
import socket
from contextlib import nullcontext, suppress
from typing import Any, Protocol

import psutil

from agsel.errors import RunError, UserError, one_line

ATTEMPT = 5.0
"""Seconds for an attempt to reach one of the addresses."""
MOST_ADDRESSES = 16
"""As a message of MPICH's protocol has 1024 bytes."""
WITHOUT_MPI = "or set MASTER_ADDR to the first host and MASTER_PORT to a free port there, in all processes"


class Exchange(Protocol):
    """How the first process tells the others something."""

    def tell(self, text: str) -> str:
        """What the first process has passed as `text`. On every process, once."""

    def end(self) -> None:
        """Wait until all processes have come here."""


class PmiExchange:
    """By the first version of MPICH's Process Management Interface, over a connection that `mpirun` has opened.

    Args:
        patience: seconds to wait for an answer, which may have to wait for all processes.
    """

    def __init__(self, patience: float) -> None:
        self._patience = patience
        self._connection = os.fdopen(os.dup(int(os.environ["PMI_FD"])), "r+b", buffering=0)
        self._ask("init", pmi_version="1", pmi_subversion="1")
        self._space = self._ask("get_my_kvsname")["kvsname"]

    def tell(self, text: str) -> str:
        """See `Exchange`."""
        if os.environ["PMI_RANK"] == "0":
            self._ask("put", kvsname=self._space, key="agsel", value=text)
        self._ask("barrier_in")
        return self._ask("get", kvsname=self._space, key="agsel")["value"]

    def end(self) -> None:
        """See `Exchange`."""
        self._ask("barrier_in")
        self._ask("finalize")
        self._connection.close()

    def _ask(self, command: str, **values: str) -> dict[str, str]:
        words = [f"{name}={value}" for name, value in {"cmd": command, **values}.items()]
        self._connection.write(f"{' '.join(words)}\n".encode())
        heard, _, _ = select.select([self._connection], [], [], self._patience)
        answer = self._connection.readline().decode() if heard else ""
        if not answer:
            raise RunError(
                f"mpirun has not answered within {self._patience:g} s (--rank_timeout), or has ended: perhaps it could "
                "not start the processes of another host; look at what it says"
            )
        return dict(word.split("=", 1) for word in answer.split() if "=" in word)


class Mpi4pyExchange:
    """By mpi4py.

    Args:
        mpi: its module `mpi4py.MPI`.
    """

    def __init__(self, mpi: Any) -> None:
        self._mpi = mpi

    def tell(self, text: str) -> str:
        """See `Exchange`."""
        return self._mpi.COMM_WORLD.bcast(text)

    def end(self) -> None:
        """See `Exchange`."""
        self._mpi.COMM_WORLD.Barrier()
        self._mpi.Finalize()


def meet(started: str, rank: int, size: int, abi: str, patience: float) -> tuple[str, str]:
    """Address and port at which this process reaches the first one. On all processes that MPI has started.

    MASTER_ADDR and MASTER_PORT have the last word, if one is set. Else it is a free port, and of the first process's
    host name and its addresses the first at which it answers this process.

    Args:
        started: what MPI has done, for errors.
        rank: of this process.
        size: number of processes.
        abi: the kind of MPI, as mpi4py calls it.
        patience: seconds to wait for the others.

    Raises:
        RunError: the others have not come.
        UserError: the processes cannot tell each other anything, or this one does not reach the first.
    """
    exchange = _exchange(started, size, abi, patience)
    with _listening(size) if rank == 0 else nullcontext() as server:
        port, *addresses = exchange.tell(_places(server) if server else "").split(",")
        address = _reachable(addresses, int(port))
        exchange.end()  # before the first process closes the port
    return address, port


def _exchange(started: str, size: int, abi: str, patience: float) -> Exchange:
    if abi == "mpich" and "PMI_FD" in os.environ:
        return PmiExchange(patience)
    os.environ.setdefault("MPI4PY_MPIABI", abi)
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:  # a RuntimeError if mpi4py is there, but not the MPI library
        raise UserError(
            f"{started}, which need mpi4py to find each other, but: {one_line(error)}; pip install 'agsel[mpi]' beside "
            f"this MPI, {WITHOUT_MPI}"
        ) from error
    if (found := MPI.COMM_WORLD.Get_size()) != size:
        raise UserError(
            f"{started}, but mpi4py knows of {found}: it belongs to another MPI; pip install --force-reinstall "
            f"--no-binary mpi4py mpi4py, with mpicc of this one in PATH, {WITHOUT_MPI}"
        )
    return Mpi4pyExchange(MPI)


def _listening(size: int) -> socket.socket:
    port = int(os.environ.get("MASTER_PORT", "0"))
    both = socket.has_dualstack_ipv6()
    try:
        family = socket.AF_INET6 if both else socket.AF_INET
        return socket.create_server(("", port), family=family, backlog=size, dualstack_ipv6=both)
    except (OSError, OverflowError) as error:
        raise UserError(f"MASTER_PORT={port} cannot be used: {one_line(error)}; set another, or none") from error


def _places(server: socket.socket) -> str:
    """Port, host name and addresses of the first process."""
    own = [address for addresses in psutil.net_if_addrs().values() for address in addresses]
    ip4, ip6 = ([one.address for one in own if one.family == kind] for kind in (socket.AF_INET, socket.AF_INET6))
    loopback = [address for address in ip4 if address.startswith("127.")]
    others = [address for address in [*ip4, *ip6] if address not in (*loopback, "::1") and "%" not in address]
    addresses = [socket.gethostname(), *others[:MOST_ADDRESSES], *loopback]
    if "MASTER_ADDR" in os.environ:
        addresses = [os.environ["MASTER_ADDR"]]
    return ",".join([str(server.getsockname()[1]), *addresses])


def _reachable(addresses: list[str], port: int) -> str:
    for address in addresses:
        with suppress(OSError):
            socket.create_connection((address, port), timeout=ATTEMPT).close()
            return address
    raise UserError(
        f"host {socket.gethostname()} reaches the first rank at none of {', '.join(addresses)}, port {port}: set "
        "MASTER_ADDR to an address of its host that all hosts reach"
    )
