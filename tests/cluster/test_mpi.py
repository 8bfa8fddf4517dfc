"""Runs under the `mpirun` of Open MPI and of MPICH on two hosts, started by hand and by `deepspeed`."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.cluster.hosts import Hosts, hosts, require, unavailable
from tests.cluster.training import RANK_TIMEOUT, HostsRun, Training
from tests.distributed import environment, free_port

pytestmark = pytest.mark.cluster
PASSED = ("PATH", "PYTHONPATH", "DS_ACCELERATOR", "OMP_NUM_THREADS", "TORCH_EXTENSIONS_DIR", "HF_HUB_OFFLINE")
"""Variables that Open MPI and `deepspeed` pass on to other hosts only if they are told to."""
AS_ROOT = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
PLACES = Path(__file__).with_name("say_place.py")


@pytest.fixture(scope="module")
def made() -> Iterator[Hosts]:
    require("mpirun.openmpi", "mpirun.mpich")
    if find_spec("mpi4py") is None:
        unavailable("needs mpi4py")
    with hosts(2) as two:
        yield two


@pytest.fixture(scope="module")
def training(tmp_path_factory: pytest.TempPathFactory) -> Training:
    return Training(tmp_path_factory.mktemp("mpi"))


def open_mpi(*options: object, where: str = "n1:1,n2:1") -> list[object]:
    passed = [word for name in PASSED for word in ("-x", name)]
    return ["mpirun.openmpi", "-n", 2, "--host", where, *passed, *options, sys.executable]


def mpich(*options: object, where: str = "n1,n2") -> list[object]:
    return [
        "mpirun.mpich",
        "-n",
        2,
        "-ppn",
        1,
        "-launcher",
        "ssh",
        "-hosts",
        where,
        "-genvall",
        *options,
        sys.executable,
    ]


def by_deepspeed(made: Hosts, launcher: str) -> tuple[list[object], dict[str, str]]:
    """The command, and its environment, in which `mpirun` is that of the launcher."""
    commands = made.folder / launcher
    commands.mkdir()
    (commands / "mpirun").write_text(f'#!/bin/sh\nexec mpirun.{launcher} "$@"\n')
    (commands / "mpirun").chmod(0o755)
    (made.folder / "hostfile").write_text("n1 slots=1\nn2 slots=1\n")
    told = environment() | {"PATH": f"{commands}{os.pathsep}{environment()['PATH']}"}
    (made.folder / "deepspeed_env").write_text("".join(f"{name}={told[name]}\n" for name in PASSED if name in told))
    command = [
        "deepspeed",
        "--hostfile",
        made.folder / "hostfile",
        "--launcher",
        launcher,
        "--master_port",
        free_port(),
    ]
    return command, AS_ROOT | {"PATH": told["PATH"], "DS_ENV_FILE": str(made.folder / "deepspeed_env")}


def test_a_run_goes_on_under_every_mpi(made: Hosts, training: Training) -> None:
    """Each launch joins both hosts and goes on from the checkpoint of the one before."""
    run = HostsRun(made, training.folder)
    command = run.start("n1", [*open_mpi(), *training.script("step 3")], AS_ROOT)
    run.reaches("step 3")
    command.send_signal(signal.SIGUSR1)
    assert run.exit_codes(60) == [0]
    assert "2 ranks" in run.output
    first = run.checkpoint()

    run = HostsRun(made, training.folder)
    command = run.start("n1", [*mpich(), *training.script("step 6")])
    run.reaches("step 6")
    command.send_signal(signal.SIGTERM)
    assert run.exit_codes(60) == [0]
    assert f"resume    {first}, every file verified" in run.output
    assert "2 ranks" in run.output
    assert run.checkpoint() != first


@pytest.mark.parametrize("launcher", ["openmpi", "mpich"])
def test_deepspeed_starts_a_run_and_a_killed_rank_ends_it(made: Hosts, training: Training, launcher: str) -> None:
    command, env = by_deepspeed(made, launcher)
    run = HostsRun(made, training.folder)
    run.start("n1", [*command, *training.script("step 9")], env)
    run.kill(1, "step 9")
    [code] = run.exit_codes(2 * RANK_TIMEOUT)
    assert code != 0, run.output
    assert "2 ranks" in run.output
