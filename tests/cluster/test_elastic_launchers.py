"""Runs under `torchrun` on two hosts, `accelerate launch`, and in the pods of a PyTorchJob.

Each launch goes on from the checkpoint of the one before.
"""

from __future__ import annotations

import shlex
import signal
from collections.abc import Iterator

import pytest
import yaml

from tests.cluster.hosts import Hosts, hosts
from tests.cluster.hosts_run import RANK_TIMEOUT, HostsRun, Training
from tests.distributed import REPOSITORY, free_port

pytestmark = pytest.mark.cluster
TRAIN = "launch/train.py --config qwen2.5-0.5b-gsm8k"
"""In the manifest, what the tests replace."""


@pytest.fixture(scope="module")
def made() -> Iterator[Hosts]:
    with hosts(2) as two:
        yield two


@pytest.fixture(scope="module")
def training(tmp_path_factory: pytest.TempPathFactory) -> Training:
    return Training(tmp_path_factory.mktemp("elastic"))


def variables_of_pods() -> Iterator[dict[str, str]]:
    """What Kubeflow's operator sets in two pods with one process each."""
    address, port = "n1", str(free_port())
    for rank in range(2):
        plain = {"MASTER_ADDR": address, "MASTER_PORT": port, "WORLD_SIZE": "2", "RANK": str(rank)}
        torchrun = {"MASTER_ADDR": address, "MASTER_PORT": port, "NNODES": "2", "NODE_RANK": str(rank)}
        named = {f"PET_{name}": value for name, value in torchrun.items()}
        yield {"PYTHONUNBUFFERED": "1", **plain, **named, "PET_NPROC_PER_NODE": "1"}


def test_a_stopped_agent_of_torchrun_stops_the_run(made: Hosts, training: Training) -> None:
    run, port = HostsRun(made, training.folder), free_port()
    meeting = ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"n1:{port}", "--rdzv-id", port]
    agents = [
        run.start(host, ["torchrun", "--nnodes", 2, "--nproc-per-node", 1, *meeting, *training.script("step 3")])
        for host in ("n1", "n2")
    ]
    run.reaches("step 3")
    agents[0].send_signal(signal.SIGTERM)
    run.ends(60)
    assert "2 ranks" in run.output
    assert training.checkpoint()


def test_a_pod_that_has_to_go_stops_the_run_and_no_pod_is_finished(made: Hosts, training: Training) -> None:
    """As the manifest says, `restartPolicy: OnFailure` starts both again."""
    before = training.checkpoint()
    manifest = yaml.safe_load((REPOSITORY / "launch" / "pytorchjob.yaml").read_text())
    [container] = manifest["spec"]["pytorchReplicaSpecs"]["Worker"]["template"]["spec"]["containers"]
    [script] = container["args"]
    assert TRAIN in script
    words = [*container["command"], script.replace(TRAIN, shlex.join(map(str, training.script("step 6"))))]
    run = HostsRun(made, training.folder)
    pods = [
        run.start(host, words, variables | {"RUN_FOLDER": str(training.folder)})
        for host, variables in zip(("n1", "n2"), variables_of_pods(), strict=True)
    ]
    run.reaches("step 6")
    pods[1].send_signal(signal.SIGTERM)
    assert run.exit_codes(60) == [1, 1]
    assert f"resume    {before}, every file verified" in run.output
    assert training.checkpoint() != before


def test_a_killed_rank_ends_both_agents_of_torchrun(made: Hosts, training: Training) -> None:
    run, port = HostsRun(made, training.folder), free_port()
    for number, host in enumerate(("n1", "n2")):
        place = ["--node-rank", number, "--master-addr", "n1", "--master-port", port]
        run.start(host, ["torchrun", "--nnodes", 2, "--nproc-per-node", 1, *place, *training.script("step 9")])
    run.kill(1, "step 9")
    assert 0 not in run.exit_codes(2 * RANK_TIMEOUT)
    assert "2 ranks" in run.output


def test_accelerate_launch_is_stopped_on_one_host(made: Hosts, training: Training) -> None:
    run = HostsRun(made, training.folder)
    options = ["--use_deepspeed", "--num_processes", 2, "--main_process_port", free_port()]
    command = run.start("n1", ["accelerate", "launch", *options, *training.script("step 9")])
    run.reaches("step 9")
    command.send_signal(signal.SIGTERM)
    run.ends(60)
    assert "2 ranks" in run.output
    assert training.checkpoint()


def test_pods_of_one_process_need_no_torchrun(made: Hosts, training: Training) -> None:
    """Nobody says the process its place in the pod."""
    run = HostsRun(made, training.folder)
    for host, variables in zip(("n1", "n2"), variables_of_pods(), strict=True):
        run.start(host, ["python", *training.script("step 12")], variables)
    run.kill(1, "step 12")
    assert 0 not in run.exit_codes(2 * RANK_TIMEOUT)
    assert "2 ranks" in run.output
