"""What `srun` says to each task of a step, in the words of torch and DeepSpeed.

All of it is in the environment: containers have no `scontrol`.
"""

from __future__ import annotations

import os
import re
import socket

from agsel.errors import UserError

FIRST_PORT, PORTS = 10_000, 22_000
"""Ports of ranks, below those that systems hand out for connections."""
STEPS = 16
"""Steps of a job that may run at once on a host and do not meet."""
NEEDED = (
    *("SLURM_PROCID", "SLURM_LOCALID", "SLURM_NODEID", "SLURM_JOB_ID", "SLURM_STEP_ID"),
    *("SLURM_STEP_NUM_TASKS", "SLURM_STEP_TASKS_PER_NODE", "SLURM_STEP_NODELIST"),
)


def join_step(started: str) -> None:
    """Set the variables by which the tasks of a step find each other, but for those that are set.

    Args:
        started: says that there are others.

    Raises:
        UserError: something is missing, or the first host cannot be found.
    """
    missing = [name for name in NEEDED if name not in os.environ]
    if missing:
        raise UserError(f"{started}, but these do not have {', '.join(missing)}: pass on all that it sets")
    said = {name: os.environ[name] for name in NEEDED}
    tasks = tasks_of(said["SLURM_STEP_TASKS_PER_NODE"], int(said["SLURM_NODEID"]))
    port = port_of(int(said["SLURM_JOB_ID"]), int(said["SLURM_STEP_ID"]))
    os.environ.setdefault("LOCAL_RANK", said["SLURM_LOCALID"])
    os.environ.setdefault("LOCAL_WORLD_SIZE", str(tasks))
    os.environ.setdefault("MASTER_PORT", str(port))
    if "MASTER_ADDR" not in os.environ:
        os.environ["MASTER_ADDR"] = _require_known(first_host(said["SLURM_STEP_NODELIST"]))
    os.environ.update(RANK=said["SLURM_PROCID"], WORLD_SIZE=said["SLURM_STEP_NUM_TASKS"])


def first_host(hosts: str) -> str:
    """Of a list such as `gpu[01-03,07]-a,login1`."""
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])*", hosts)
    assert first is not None
    return re.sub(r"\[([^\],-]*)[^\]]*\]", r"\1", first.group())


def tasks_of(counts: str, host: int) -> int:
    """Tasks of a host by a list such as `2(x3),1`.

    Args:
        counts: of all hosts in their order.
        host: its place, from 0.
    """
    listed = re.findall(r"(\d+)(?:\(x(\d+)\))?", counts)
    return [int(count) for count, times in listed for _ in range(int(times or 1))][host]


def port_of(job: int, step: int) -> int:
    """A port that no other step of the job has, nor those of jobs with neighbouring numbers."""
    return FIRST_PORT + (STEPS * job + step % STEPS) % PORTS


def _require_known(host: str) -> str:
    try:
        socket.getaddrinfo(host, None)
    except OSError as error:
        raise UserError(
            f"the first host of the step, {host}, cannot be found by that name ({error.strerror}): set MASTER_ADDR to "
            "an address of it that all hosts reach"
        ) from error
    return host
