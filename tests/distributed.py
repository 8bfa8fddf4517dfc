"""Launch a script on several ranks through the real `deepspeed` command: on the CPU with gloo, or on GPUs with NCCL."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
RANKS = int(os.environ.get("AGSEL_TEST_RANKS", "2"))
"""Ranks of a launch that does not name their number."""
SHARED_GPU = os.environ.get("AGSEL_TEST_SHARED_GPU") == "1"
"""Whether all ranks of a GPU test share the first GPU: their times say nothing, their results are right."""
OF_A_RANK = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
PATIENCE = 1200 if SHARED_GPU else 900 if os.environ.get("AGSEL_TEST_DEVICE") == "cuda" else 300
"""Seconds that a launch may take."""


def launch(
    script: str | Path,
    *arguments: object,
    ranks: int = RANKS,
    timeout: float = PATIENCE,
    env: dict[str, str] | None = None,
) -> subprocess.CompletedProcess[str]:
    """Run `deepspeed --num_gpus RANKS script arguments` and return what it printed, stderr included in stdout.

    Raises:
        TimeoutExpired: it did not end in time; every process it started has been killed.
    """
    deepspeed = shutil.which("deepspeed", path=environment()["PATH"])
    assert deepspeed is not None, "the deepspeed command is not installed"
    port = free_port()
    return _run([deepspeed, "--num_gpus", ranks, "--master_port", port, script, *arguments], port, timeout, env or {})


def start_ranks(
    script: str | Path, *arguments: object, ranks: int = RANKS, timeout: float = PATIENCE
) -> subprocess.CompletedProcess[str]:
    """Like `launch`, for a script which is not about its launcher: the `deepspeed` command takes seconds to start."""
    port = free_port()
    command = [sys.executable, REPOSITORY / "tests" / "start_ranks.py", ranks, port, script, *arguments]
    return _run(command, port, timeout, {})


def _run(words: Sequence[object], port: int, timeout: float, env: dict[str, str]) -> subprocess.CompletedProcess[str]:
    command = list(map(str, words))
    process = subprocess.Popen(
        command,
        env=environment() | env,
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        kill_session(process.pid)
        output, _ = process.communicate()
        raise subprocess.TimeoutExpired(command, timeout, output) from None
    finally:
        remove_shared_memory(port)
    return subprocess.CompletedProcess(command, process.returncode, output, "")


def run_ranks(script: str | Path, *arguments: object, ranks: int = RANKS, timeout: float = PATIENCE) -> str:
    """Like `start_ranks`, for a script that must succeed. Returns its output."""
    result = start_ranks(script, *arguments, ranks=ranks, timeout=timeout)
    assert result.returncode == 0, result.stdout[-6000:]
    return result.stdout


def environment() -> dict[str, str]:
    """The environment of a run; on the CPU unless AGSEL_TEST_DEVICE=cuda, as tests/gpu sets it.

    In no job of Slurm, and not as the rank that a test may have made of its process.
    """
    own = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_") and name not in OF_A_RANK}
    return own | {
        "DS_ACCELERATOR": os.environ.get("AGSEL_TEST_DEVICE", "cpu"),
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(REPOSITORY), *filter(None, [os.environ.get("PYTHONPATH")])]),
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "TORCH_EXTENSIONS_DIR": str(REPOSITORY / ".cache" / "torch_extensions"),
        "HF_HUB_OFFLINE": "1",
    }


def kill_session(leader: int) -> None:
    """Kill every process of the session that `leader` started: the launcher leaves its ranks behind."""
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                if os.getsid(int(entry.name)) == leader:
                    os.kill(int(entry.name), signal.SIGKILL)
            except ProcessLookupError:
                continue


def remove_shared_memory(port: int) -> None:
    """Remove what DeepSpeed's CPU all-reduce leaves behind: 66 MiB per rank and port, until /dev/shm is full."""
    for buffer in Path("/dev/shm").glob(f"deepspeed_allreduce_buffer_*_{port}_*"):
        buffer.unlink()


def free_port() -> int:
    """A TCP port that is free, below those that systems hand out for connections, so that none takes it meanwhile."""
    while True:
        port = random.SystemRandom().randrange(10_000, 30_000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
