"""Runs under the `mpirun` of Open MPI and of MPICH on two hosts, started by hand and by `deepspeed`."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.cluster.hosts import Hosts, hosts, require, unavailable
from tests.cluster.hosts_run import RANK_TIMEOUT, HostsRun, Training
from tests.distributed import environment, free_port

pytestmark = pytest.mark.cluster
PASSED = ("PATH", "PYTHONPATH", "DS_ACCELERATOR", "OMP_NUM_THREADS", "TORCH_EXTENSIONS_DIR", "HF_HUB_OFFLINE")
"""Variables that Open MPI and `deepspeed` pass on to other hosts only if they are told to."""
AS_ROOT = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
SAY_PLACE = (Path(__file__).with_name("say_place.py"), 60)


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
    first = training.checkpoint()

    run = HostsRun(made, training.folder)
    command = run.start("n1", [*mpich(), *training.script("step 6")])
    run.reaches("step 6")
    command.send_signal(signal.SIGTERM)
    assert run.exit_codes(60) == [0]
    assert f"resume    {first}, every file verified" in run.output
    assert "2 ranks" in run.output
    assert training.checkpoint() != first


def test_deepspeed_starts_a_run_and_a_killed_rank_ends_it(made: Hosts, training: Training) -> None:
    command, env = by_deepspeed(made, "openmpi")
    run = HostsRun(made, training.folder)
    run.start("n1", [*command, *training.script("step 9")], env)
    run.kill(1, "step 9")
    assert 0 not in run.exit_codes(2 * RANK_TIMEOUT)
    assert "2 ranks" in run.output


def test_a_deepspeed_command_that_is_told_to_stop_lets_the_run_save(made: Hosts, training: Training) -> None:
    """Far above its ranks, which `mpirun` does not tell."""
    command, env = by_deepspeed(made, "mpich")
    run = HostsRun(made, training.folder)
    started = run.start("n1", [*command, *training.script("step 9")], env)
    run.reaches("step 9")
    started.send_signal(signal.SIGTERM)
    run.ends(60)
    assert "stopped   the launcher is gone" in run.output
    assert "2 ranks" in run.output
    assert training.checkpoint()


def places(*commands: subprocess.Popen[str]) -> list[list[dict[str, str]]]:
    """What the ranks of each command say, in order."""
    said = []
    for command in commands:
        output, _ = command.communicate(timeout=120)
        assert command.returncode == 0, output
        lines = re.findall(r"^PLACE 2 ranks (.*)$", output, re.M)
        said.append(
            sorted((dict(word.split("=") for word in line.split()) for line in lines), key=lambda one: one["RANK"])
        )
    return said


def start(made: Hosts, command: list[object], env: dict[str, str] | None = None) -> subprocess.Popen[str]:
    output = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return made.start("n1", command, AS_ROOT | (env or {}), **output)


def test_jobs_side_by_side_choose_ports_of_their_own(made: Hosts) -> None:
    jobs = [open_mpi(where="n1:2"), open_mpi(where="n1:2"), mpich(where="n1"), mpich(where="n1")]
    said = places(*[start(made, [*job, *SAY_PLACE]) for job in jobs])
    for first, second in said:
        assert [first["LOCAL_RANK"], second["LOCAL_RANK"]] == ["0", "1"]
        assert [first["LOCAL_WORLD_SIZE"], second["LOCAL_WORLD_SIZE"]] == ["2", "2"]
        assert first["MASTER_PORT"] == second["MASTER_PORT"]
    assert len({first["MASTER_PORT"] for first, _ in said}) == 4


def test_ranks_on_other_hosts_find_an_address_that_they_reach(made: Hosts) -> None:
    """The first host's name leads the second to itself, and so does an address that both have."""
    same = "172.17.0.1"
    (made.folder / "wrong").write_text(f"127.0.0.1 localhost\n{same} n1\n{made.addresses['n2']} n2\n")
    for host in ("n1", "n2"):
        made.run(host, ["ip", "link", "add", "docker0", "type", "bridge"])
        made.run(host, ["ip", "address", "add", f"{same}/16", "dev", "docker0"])
        made.run(host, ["ip", "link", "set", "docker0", "up"])
    made.run("n2", ["mount", "--bind", made.folder / "wrong", "/etc/hosts"])
    try:
        only = [word for part in ("oob", "btl") for word in ("--mca", f"{part}_tcp_if_include", "eth0")]
        options = [*only, "-x", "GLOO_SOCKET_IFNAME"]
        [[_, second]] = places(start(made, [*open_mpi(*options), *SAY_PLACE], {"GLOO_SOCKET_IFNAME": "eth0"}))
        assert second["MASTER_ADDR"] == made.addresses["n1"]
        assert (second["LOCAL_RANK"], second["LOCAL_WORLD_SIZE"]) == ("0", "1")
    finally:
        made.run("n2", ["umount", "/etc/hosts"])
        for host in ("n1", "n2"):
            made.run(host, ["ip", "link", "delete", "docker0"])


def test_the_user_has_the_last_word_on_where_ranks_meet(made: Hosts) -> None:
    port = str(free_port())
    [[first, _]] = places(start(made, [*mpich(), *SAY_PLACE], {"MASTER_PORT": port}))
    assert first["MASTER_PORT"] == port


def refusal(made: Hosts, command: list[object], env: dict[str, str]) -> list[str]:
    process = start(made, [*command, *SAY_PLACE], env)
    output, _ = process.communicate(timeout=120)
    assert process.returncode != 0
    assert "Traceback" not in output
    return re.findall("^agsel: error: .*", output, re.M)


def test_what_keeps_ranks_of_mpi_from_meeting_is_said_in_one_line(made: Hosts) -> None:
    both = open_mpi("-x", "MPI4PY_MPIABI", "-x", "MPI4PY_LIBMPI", where="n1:2")
    [line] = refusal(made, both, {"MPI4PY_MPIABI": "mpich", "MPI4PY_LIBMPI": "none"})
    assert (
        "Open MPI has started 2 processes, which need mpi4py to find each other, but: libmpi.so.12: cannot open" in line
    )
    assert "or set MASTER_ADDR" in line
    port = str(free_port())
    taking = f"import socket; server = socket.create_server(('', {port})); print(flush=True); server.accept()"
    with start(made, [sys.executable, "-c", taking]) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "\n"
        [line] = refusal(made, mpich(where="n1"), {"MASTER_PORT": port})
        other.kill()
    assert f"MASTER_PORT={port} cannot be used: " in line


def test_ranks_of_mpich_do_not_wait_for_a_host_on_which_nothing_starts(made: Hosts) -> None:
    """Their `mpirun` does, for ever."""
    command = start(made, [*mpich(where="n1,nowhere"), SAY_PLACE[0], 5])
    assert command.stdout is not None
    line = next(line for line in command.stdout if line.startswith("agsel: error: "))
    command.kill()
    command.communicate()
    assert "mpirun has not answered within 5 s (--rank_timeout)" in line
