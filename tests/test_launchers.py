"""What the environment of a launcher makes of a process: a rank, the only one, or one that is refused."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from deepspeed.accelerator import get_accelerator

from agsel.errors import UserError
from agsel.place import PLACES, is_first_of_host
from agsel.runs import mpi
from agsel.runs.launchers import LAUNCHERS, Launcher, set_environment
from agsel.runs.slurm import first_host, port_of, tasks_of

PATIENCE = 60.0
COMMON = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
ADDRESS = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29999"}
OPEN_MPI = {"OMPI_COMM_WORLD_SIZE": "1", "OMPI_COMM_WORLD_LOCAL_RANK": "0"}
STEP = {
    **{"SLURM_PROCID": "4", "SLURM_LOCALID": "1", "SLURM_NODEID": "2", "SLURM_JOB_ID": "7", "SLURM_STEP_ID": "1"},
    **{"SLURM_STEP_NUM_TASKS": "7", "SLURM_STEP_TASKS_PER_NODE": "1(x2),2,3"},
    **{"SLURM_STEP_NODELIST": "localhost,n[2-4]"},
}
"""What `srun` sets for a task of four hosts."""


@pytest.fixture(autouse=True)
def without_launcher() -> Iterator[None]:
    before = dict(os.environ)
    known = {getattr(launcher, name) for launcher in LAUNCHERS for name in ("rank", "size", "local_rank", "local_size")}
    for name in {*COMMON, "LOCAL_WORLD_SIZE", *PLACES, *known, "LOCAL_SIZE"} & {*os.environ}:
        del os.environ[name]
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"WORLD_SIZE": "1"},
        {"SLURM_NTASKS": "4", "SLURM_PROCID": "0"},  # in the script of a job, or in a shell of salloc
        {"SLURM_STEP_NUM_TASKS": "1", "PMIX_RANK": "0"},
        OPEN_MPI | {"SLURM_STEP_NUM_TASKS": "2"},  # mpirun has its helpers started by srun
    ],
    ids=str,
)
def test_one_process_is_one_run(environment: dict[str, str]) -> None:
    os.environ.update(environment)
    set_environment(PATIENCE)
    assert [os.environ[name] for name in COMMON[:3]] == ["0", "0", "1"]


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        (
            {"SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "1"},
            "srun has started 2 processes, but these do not have SLURM_LOCALID, SLURM_NODEID, .*: pass on",
        ),
        ({"SLURM_STEP_NUM_TASKS": "3", "PMIX_RANK": "0"}, "srun has started 3 processes"),
        ({"PMIX_RANK": "0"}, "PMIx has started this process"),
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE is 2, but RANK is not set"),
        ({"RANK": "0"}, "RANK is set, but not WORLD_SIZE"),
        ({"RANK": "1", "WORLD_SIZE": "2"}, "RANK is set, but not MASTER_ADDR and MASTER_PORT"),
        ({"SLURM_STEP_NUM_TASKS": "two"}, "SLURM_STEP_NUM_TASKS is 'two', which is no number"),
    ],
    ids=str,
)
def test_several_processes_that_cannot_find_each_other_are_refused(environment: dict[str, str], words: str) -> None:
    os.environ.update(environment)
    with pytest.raises(UserError, match=words):
        set_environment(PATIENCE)
    assert environment.items() >= {name: os.environ[name] for name in COMMON if name in os.environ}.items()


def test_the_launcher_that_is_nearest_counts() -> None:
    """train.sbatch, and `deepspeed` or `torchrun` under `srun`."""
    own = {"RANK": "1", "WORLD_SIZE": "4", **ADDRESS}
    os.environ.update(own | {"SLURM_STEP_NUM_TASKS": "2", "OMPI_COMM_WORLD_SIZE": "2"})
    set_environment(PATIENCE)
    assert own == {name: os.environ[name] for name in own}


@pytest.mark.parametrize("more", [{}, {"PMI_SIZE": "7", "PMI_RANK": "4"}, {"WORLD_SIZE": "7"}], ids=str)
def test_tasks_of_srun_find_each_other(more: dict[str, str]) -> None:
    """Also with the variables of `--mpi=pmi2`."""
    os.environ.update(STEP | more)
    set_environment(PATIENCE)
    assert [os.environ[name] for name in COMMON] == ["4", "1", "7", "localhost", str(port_of(7, 1))]
    assert os.environ["LOCAL_WORLD_SIZE"] == "2"


def test_what_the_user_has_set_for_tasks_of_srun_stays() -> None:
    own = {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", **ADDRESS}
    os.environ.update(STEP | own)
    set_environment(PATIENCE)
    assert own == {name: os.environ[name] for name in own}


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"WORLD_SIZE": "8"}, "WORLD_SIZE is 8, but srun has started 7 processes: unset it"),
        ({"SLURM_STEP_NODELIST": "no-such-host[1-2]"}, "first host of the step, no-such-host1, cannot be found"),
    ],
    ids=str,
)
def test_tasks_of_srun_that_cannot_find_each_other_are_refused(wrong: dict[str, str], words: str) -> None:
    os.environ.update(STEP | wrong)
    with pytest.raises(UserError, match=words):
        set_environment(PATIENCE)


@pytest.mark.parametrize(
    ("hosts", "first"),
    [
        ("n1", "n1"),
        ("n1,n[2-3]", "n1"),
        ("gpu[01-03,07]-a", "gpu01-a"),
        ("r[2,4]n[08-10],login", "r2n08"),
        ("n[7]", "n7"),
    ],
)
def test_the_first_host_of_a_list(hosts: str, first: str) -> None:
    assert first_host(hosts) == first


def test_ranks_of_a_host_by_a_list() -> None:
    assert [tasks_of("2(x3),1,12(x2)", host) for host in range(6)] == [2, 2, 2, 1, 12, 12]


def test_jobs_that_follow_each_other_and_their_steps_have_ports_of_their_own() -> None:
    ports = {port_of(job, step) for job in range(5000, 6000) for step in range(16)}
    assert len(ports) == 16_000
    assert 1024 < min(ports) < max(ports) < 32768


def test_a_process_that_sees_one_device_uses_it_and_knows_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """As of `srun --gpus-per-task=1`; as if there were a GPU."""
    monkeypatch.setattr(type(get_accelerator()), "device_name", lambda *_: "cuda")
    monkeypatch.setattr(type(get_accelerator()), "device_count", lambda _: 1)
    os.environ.update(STEP)
    set_environment(PATIENCE)
    assert os.environ["LOCAL_RANK"] == "0"
    assert not is_first_of_host()
    assert os.environ["LOCAL_WORLD_SIZE"] == "2"


@pytest.mark.parametrize("launcher", [launcher for launcher in LAUNCHERS if launcher.abi], ids=lambda one: one.name)
def test_processes_of_mpi_that_know_where_to_meet_need_nothing_else(launcher: Launcher) -> None:
    os.environ.update({launcher.rank: "5", launcher.size: "8", launcher.local_rank: "1", launcher.local_size: "4"})
    os.environ.update(ADDRESS)
    set_environment(PATIENCE)
    assert [os.environ[name] for name in COMMON] == ["5", "1", "8", *ADDRESS.values()]
    assert os.environ["LOCAL_WORLD_SIZE"] == "4"


@pytest.mark.parametrize("address", ["127.0.0.1", "::1"])
def test_the_first_process_of_mpi_is_reached_by_both_protocols(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class Alone:
        tell = staticmethod(str)
        end = staticmethod(lambda: None)

    if address == "::1" and not Path("/proc/sys/net/ipv6/conf/lo").exists():
        pytest.skip("no IPv6 here")
    monkeypatch.setattr(mpi, "_exchange", lambda *_: Alone)
    os.environ["MASTER_ADDR"] = address
    found, port = mpi.meet("MPI has started 1 process", 0, 1, "mpich", PATIENCE)
    assert found == address
    assert int(port) > 0


def test_deepspeed_says_how_many_ranks_share_the_host() -> None:
    os.environ.update({"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "4", "LOCAL_SIZE": "2", **ADDRESS})
    set_environment(PATIENCE)
    assert os.environ["LOCAL_WORLD_SIZE"] == "2"


@pytest.mark.parametrize("place", PLACES)
def test_one_process_of_a_host_speaks(place: str) -> None:
    assert is_first_of_host()
    os.environ[place] = "1"
    assert not is_first_of_host()
    os.environ[place] = "0"
    assert is_first_of_host()


def test_every_launcher_is_known_where_one_process_of_a_host_speaks() -> None:
    assert {launcher.local_rank for launcher in LAUNCHERS} < {*PLACES}
