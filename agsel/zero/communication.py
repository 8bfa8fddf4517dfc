"""How the ranks of a run begin to talk: torch's process group, and DeepSpeed with its operator for the CPU.

That operator is compiled when it is first needed. torch keeps others from it with a lock that outlives a killed process
and would let them wait for ever, and silently. So it is compiled here, before DeepSpeed asks for it, under a lock that
ends with its process.
"""

from __future__ import annotations

import fcntl
import os
import signal
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import IO

import deepspeed
import psutil
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.comm.torch import TorchBackend
from deepspeed.git_version_info import installed_ops
from deepspeed.ops.op_builder.builder import OpBuilder
from torch.distributed import HashStore

from agsel import upstream
from agsel.errors import RunError, UserError, one_line
from agsel.place import is_first_of_host
from agsel.zero.consensus import every_rank_does

EXTENSIONS = "TORCH_EXTENSIONS_DIR"
TICK = 0.2
"""Seconds between two looks at a lock."""
LOOKS_IN_SILENCE = 10
"""After which a run says that it waits for another, which takes a second unless it compiles."""
RELIES_ON = {
    TorchBackend: ("__init__", "init_process_group"),
    sys.modules[TorchBackend.__module__]: ("build_shm_op",),
    OpBuilder: ("jit_load",),
}
"""What this module depends on inside of DeepSpeed without naming it."""

_building: list[Path] = []
"""torch's lock of the operator, while this process compiles or loads it."""


def start_process_group(timeout: timedelta) -> None:
    """Start torch.distributed over all ranks, as RANK, WORLD_SIZE and the like say.

    Args:
        timeout: how long the ranks wait for each other.

    Raises:
        RuntimeError: they have waited in vain.
    """
    backend = get_accelerator().communication_backend_name()
    if os.environ["WORLD_SIZE"] == "1":
        # Nobody else has to find it: no port, which another run could take, and no buffer shared under its name.
        os.environ.pop("LOCAL_SIZE", None)
        dist.init_process_group(backend, store=HashStore(), rank=0, world_size=1)
        return
    on_cuda = get_accelerator().device_name() == "cuda"
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if on_cuda else None
    dist.init_process_group(backend, timeout=timeout, device_id=device)


def start_deepspeed() -> None:
    """Let DeepSpeed use torch's process group. On the CPU its operator is compiled before, if need be. On every rank.

    The first rank goes before those of other hosts, which may share the folder, and each host's before its others.

    Raises:
        RunError: on every rank; the operator cannot be compiled, or this DeepSpeed differs from the tested one here.
        UserError: on every rank; the folder of the operator cannot be used.
    """
    upstream.require_tested(__name__)
    builder = get_accelerator().create_op_builder("ShareMemCommBuilder")
    if builder is not None and _is_compiled_here(builder):
        own = 0 if dist.get_rank() == 0 else 1 if is_first_of_host() else 2
        for turn in range(3):
            # One for all: a rank without the operator would leave the others waiting inside of it.
            every_rank_does(partial(_load, builder) if turn == own else _do_nothing, None)
    deepspeed.init_distributed(auto_mpi_discovery=False, verbose=False)


def abandon_operator() -> None:
    """Give torch's lock back, before this process is ended while it compiles."""
    for lock in _building:
        lock.unlink(missing_ok=True)


def extensions_folder() -> Path:
    """Where torch puts compiled operators: where the user says, else in a folder of agsel's own.

    That is of one host: they are made for its CPU, and hosts may share a home.
    """
    if os.environ.get(EXTENSIONS):
        return Path(os.environ[EXTENSIONS])
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    versions = f"python{sys.version_info.major}.{sys.version_info.minor}-torch{torch.__version__}"
    os.environ[EXTENSIONS] = str(cache / "agsel" / "torch_extensions" / versions / socket.gethostname())
    return Path(os.environ[EXTENSIONS])


def _is_compiled_here(builder: OpBuilder) -> bool:
    """Whether DeepSpeed uses the operator on this machine, and was not installed with it."""
    return bool(deepspeed.ops.__compatible_ops__.get(builder.name)) and not installed_ops.get(builder.name)


def _do_nothing() -> None:
    pass


def _load(builder: OpBuilder) -> None:
    """Compile the operator, or find it compiled. DeepSpeed, which asks for it next, then finds it loaded.

    A signal that asks the run to stop must not end the compiler instead, which has the mask of this thread.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    folder = extensions_folder()
    with _only_builder(folder):
        lock = folder / builder.name / "lock"
        wait_for_other_projects(lock)
        if not lock.with_name(f"{builder.name}.so").exists():
            _say(f"compiling DeepSpeed's operator for the CPU, once: about a minute, into {folder}")
        _building.append(lock)
        try:
            builder.load()
        except (ImportError, RuntimeError) as error:
            raise RunError(
                f"DeepSpeed's operator for the CPU cannot be compiled or loaded: {_gist(error)}; mend that, or remove "
                f"{lock.parent} if it was compiled for another torch"
            ) from error
        finally:
            _building.remove(lock)


@contextmanager
def _only_builder(folder: Path) -> Iterator[None]:
    """Wait until no other process of agsel is inside. The kernel lets go when a process ends, however it does."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / "agsel.lock").open("w")
        looks = 0
        while not _try_to_lock(file):
            looks += 1
            if looks == LOOKS_IN_SILENCE:
                _say(f"waiting   for another run, which compiles DeepSpeed's operator for the CPU into {folder}")
            time.sleep(TICK)
    except OSError as error:
        raise UserError(
            f"cannot use {folder} for compiled operators ({EXTENSIONS}), {one_line(error)}: set it to a local folder"
        ) from error
    with file:
        yield


def _try_to_lock(file: IO[str]) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def wait_for_other_projects(lock: Path) -> None:
    """Until torch's lock is gone. One that no process has open was left behind, and is removed."""
    said = idle = None
    while (found := _identity(lock)) is not None:
        holder = _holder(lock)
        if holder is None and found == idle:  # twice: torch closes the file just before it removes it
            _say(f"cleared   {lock}, which a process that was killed while it compiled had left behind")
            lock.unlink(missing_ok=True)
            return
        if holder not in (None, said):
            _say(f"waiting   for process {holder}, which compiles DeepSpeed's operator for the CPU into {lock.parent}")
        said, idle = holder, found if holder is None else None
        time.sleep(TICK)


def _identity(file: Path) -> tuple[int, int] | None:
    with suppress(FileNotFoundError):
        return (status := file.stat()).st_ino, status.st_mtime_ns
    return None


def _holder(lock: Path) -> int | None:
    """The process of this host that has a file open, if this one may know."""
    path = str(lock.resolve())
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if any(file.path == path for file in process.open_files()):
                return process.pid
    return None


def _gist(error: Exception) -> str:
    """The first line that says what is wrong in the words of a compiler, or of a shell without one, else the first."""
    lines = str(error).splitlines()
    return next((line for line in lines if " error:" in line or "not found" in line), lines[0])


def _say(text: str) -> None:
    """From one rank of a host."""
    if is_first_of_host():
        sys.stdout.write(f"{text}\n")
        sys.stdout.flush()
