"""Runs under `torchrun` on two hosts, `accelerate launch`, and with the variables of a PyTorchJob."""

from __future__ import annotations

import signal
from collections.abc import Iterator

import pytest

from tests.cluster.hosts import Hosts, hosts
from tests.cluster.training import RANK_TIMEOUT, HostsRun, Training
from tests.distributed import free_port

pytestmark = pytest.mark.cluster


@pytest.fixture(scope="module")
def made() -> Iterator[Hosts]:
    with hosts(2) as two:
        yield two


@pytest.fixture(scope="module")
def training(tmp_path_factory: pytest.TempPathFactory) -> Training:
    return Training(tmp_path_factory.mktemp("elastic"))


def test_torchrun_on_two_hosts_is_stopped_and_goes_on(made: Hosts, training: Training) -> None:
    """Once by a rendezvous, once with a number for each host."""
    port = free_port()
    run = HostsRun(made, training.folder)
    meeting = ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"n1:{port}", "--rdzv-id", port]
    agents = [
        run.start(host, ["torchrun", "--nnodes", 2, "--nproc-per-node", 1, *meeting, *training.script("step 3")])
        for host in ("n1", "n2")
    ]
    run.reaches("step 3")
    agents[0].send_signal(signal.SIGTERM)
    codes = run.exit_codes(60)
    print(codes, run.output[-3000:])
    assert "2 ranks" in run.output
    first = run.checkpoint()

    run = HostsRun(made, training.folder)
    for number, host in enumerate(("n1", "n2")):
        place = ["--node-rank", number, "--master-addr", "n1", "--master-port", port]
        run.start(host, ["torchrun", "--nnodes", 2, "--nproc-per-node", 1, *place, *training.script("step 6")])
    run.kill(1, "step 6")
    assert 0 not in run.exit_codes(2 * RANK_TIMEOUT)
    assert f"resume    {first}, every file verified" in run.output
    assert "2 ranks" in run.output


def test_accelerate_launch_on_one_host(made: Hosts, training: Training) -> None:
    run = HostsRun(made, training.folder)
    options = ["--use_deepspeed", "--num_processes", 2, "--main_process_port", free_port()]
    command = run.start("n1", ["accelerate", "launch", *options, *training.script("step 6")])
    run.reaches("step 6")
    command.send_signal(signal.SIGTERM)
    codes = run.exit_codes(60)
    print(codes, run.output[-3000:])
    assert "2 ranks" in run.output
    assert run.checkpoint()


def test_the_variables_of_a_pytorchjob(made: Hosts, training: Training) -> None:
    """One process in each pod: nobody says its place there."""
    run = HostsRun(made, training.folder)
    common = {"WORLD_SIZE": "2", "MASTER_ADDR": "n1", "MASTER_PORT": str(free_port()), "PYTHONUNBUFFERED": "1"}
    for rank, host in enumerate(("n1", "n2")):
        run.start(host, ["python", *training.script("step 12")], common | {"RANK": str(rank)})
    run.kill(1, "step 12")
    assert 0 not in run.exit_codes(2 * RANK_TIMEOUT)
    assert "2 ranks" in run.output
