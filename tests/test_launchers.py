"""What the environment of a launcher makes of a process: a rank, the only one, or one that is refused."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from agsel.errors import UserError
from agsel.place import PLACES, is_first_of_host
from agsel.runs.launchers import LAUNCHERS, Launcher, set_environment

COMMON = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "LOCAL_WORLD_SIZE")
ADDRESS = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29999"}


@pytest.fixture(autouse=True)
def without_launcher() -> Iterator[None]:
    before = dict(os.environ)
    known = {getattr(launcher, name) for launcher in LAUNCHERS for name in ("rank", "size", "local_rank", "local_size")}
    for name in {*COMMON, *PLACES, *known, "LOCAL_SIZE"} & {*os.environ}:
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
        {"OMPI_COMM_WORLD_SIZE": "1", "SLURM_STEP_NUM_TASKS": "2"},  # mpirun has its helpers started by srun
    ],
    ids=str,
)
def test_one_process_is_one_run(environment: dict[str, str]) -> None:
    os.environ.update(environment)
    set_environment()
    assert [os.environ[name] for name in COMMON[:3]] == ["0", "0", "1"]


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        (
            {"SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "1"},
            "srun has started 2 processes.*use `deepspeed` or",
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
        set_environment()
    assert environment.items() >= {name: os.environ[name] for name in COMMON if name in os.environ}.items()


def test_the_launcher_that_is_nearest_counts() -> None:
    """train.sbatch, and `deepspeed` or `torchrun` under `srun`."""
    own = {"RANK": "1", "WORLD_SIZE": "4", **ADDRESS}
    os.environ.update(own | {"SLURM_STEP_NUM_TASKS": "2", "OMPI_COMM_WORLD_SIZE": "2"})
    set_environment()
    assert own == {name: os.environ[name] for name in own}


@pytest.mark.parametrize("launcher", [launcher for launcher in LAUNCHERS if launcher.abi], ids=lambda one: one.name)
def test_processes_of_mpi_that_know_where_to_meet_need_nothing_else(launcher: Launcher) -> None:
    os.environ.update({launcher.rank: "5", launcher.size: "8", launcher.local_rank: "1", launcher.local_size: "4"})
    os.environ.update(ADDRESS)
    set_environment()
    assert [os.environ[name] for name in COMMON] == ["5", "1", "8", *ADDRESS.values(), "4"]


def test_deepspeed_says_how_many_ranks_share_the_host() -> None:
    os.environ.update({"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "4", "LOCAL_SIZE": "2", **ADDRESS})
    set_environment()
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
