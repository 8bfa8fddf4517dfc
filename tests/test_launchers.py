"""What the environment of a launcher makes of a process: a rank, the only one, or one that is refused."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from deepspeed.accelerator import get_accelerator

from agsel.errors import UserError
from agsel.runs.launchers import LAUNCHERS, PLACE, PMIX, is_first_of_host, set_environment
from agsel.runs.slurm import first_host, port_of, tasks_of

COMMON = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
ADDRESS = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29999"}
OPEN_MPI = {"OMPI_COMM_WORLD_SIZE": "1", "OMPI_COMM_WORLD_LOCAL_RANK": "0"}
STEP = {
    **{"SLURM_PROCID": "4", "SLURM_LOCALID": "1", "SLURM_NODEID": "2", "SLURM_JOB_ID": "7", "SLURM_STEP_ID": "1"},
    **{"SLURM_STEP_NUM_TASKS": "7", "SLURM_STEP_TASKS_PER_NODE": "1(x2),2,3"},
    **{"SLURM_STEP_NODELIST": "localhost,n[2-4]"},
}
"""What `srun` sets for a task of four hosts."""
MPI = """
class COMM_WORLD:
    Get_rank = staticmethod(lambda: 1)
    Get_size = staticmethod(lambda: {size})
    bcast = staticmethod(lambda value, root: "10.0.0.1")
    allgather = staticmethod(lambda value: [value] * {size})
Get_processor_name = lambda: "here"
"""


@pytest.fixture(autouse=True)
def without_launcher() -> Iterator[None]:
    before = dict(os.environ)
    known = {name for launcher in LAUNCHERS for name in (launcher.size, launcher.place)} | {"LOCAL_WORLD_SIZE", PLACE}
    for name in {*COMMON, PMIX, *known} & {*os.environ}:
        del os.environ[name]
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture
def mpi4py(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file of `mpi4py.MPI` in an mpi4py that is found before any other."""
    (tmp_path / "mpi4py").mkdir()
    (tmp_path / "mpi4py" / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("mpi4py", "mpi4py.MPI"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return tmp_path / "mpi4py" / "MPI.py"


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
    set_environment()
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
        set_environment()
    assert environment.items() >= {name: os.environ[name] for name in COMMON if name in os.environ}.items()


def test_the_launcher_that_is_nearest_counts() -> None:
    """train.sbatch, and `deepspeed` or `torchrun` under `srun`."""
    own = {"RANK": "1", "WORLD_SIZE": "4", **ADDRESS}
    os.environ.update(own | {"SLURM_STEP_NUM_TASKS": "2", "OMPI_COMM_WORLD_SIZE": "2"})
    set_environment()
    assert own == {name: os.environ[name] for name in own}


@pytest.mark.parametrize("more", [{}, {"PMI_SIZE": "7", "PMI_RANK": "4"}, {"WORLD_SIZE": "7"}], ids=str)
def test_tasks_of_srun_find_each_other(more: dict[str, str]) -> None:
    """Also with the variables of `--mpi=pmi2`."""
    os.environ.update(STEP | more)
    set_environment()
    assert [os.environ[name] for name in COMMON] == ["4", "1", "7", "localhost", str(port_of(7, 1))]
    assert os.environ["LOCAL_WORLD_SIZE"] == "2"


def test_what_the_user_has_set_for_tasks_of_srun_stays() -> None:
    own = {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", **ADDRESS}
    os.environ.update(STEP | own)
    set_environment()
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
        set_environment()


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
    set_environment()
    assert os.environ["LOCAL_RANK"] == "0"
    assert not is_first_of_host()
    assert os.environ["LOCAL_WORLD_SIZE"] == "2"


@pytest.mark.parametrize("size", ["OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE"])
def test_processes_of_mpirun_find_each_other(size: str, mpi4py: Path) -> None:
    os.environ.update({size: "2", "MASTER_PORT": "29777"})
    mpi4py.write_text(MPI.format(size=2))
    set_environment()
    assert [os.environ[name] for name in COMMON[:3]] == ["1", "1", "2"]
    assert os.environ["MASTER_PORT"] == "29777"


@pytest.mark.parametrize(
    ("module", "words"),
    [
        (MPI.format(size=1), "started 2 processes, but mpi4py knows of 1: it belongs to another MPI"),
        ("raise ImportError('libmpi.so.12: cannot open shared object file')", r"libmpi\.so\.12: cannot open shared"),
        ("raise RuntimeError('cannot load MPI library')", "cannot load MPI library"),
    ],
    ids=["another MPI", "ImportError", "RuntimeError"],
)
def test_processes_of_mpirun_that_do_not_are_refused_with_the_reason(module: str, words: str, mpi4py: Path) -> None:
    os.environ["PMI_SIZE"] = "2"
    mpi4py.write_text(module)
    with pytest.raises(UserError, match=words):
        set_environment()
    assert "RANK" not in os.environ


@pytest.mark.parametrize("place", ["LOCAL_RANK", PMIX, *(launcher.place for launcher in LAUNCHERS)])
def test_one_process_of_a_host_speaks(place: str) -> None:
    assert is_first_of_host()
    os.environ[place] = "1"
    assert not is_first_of_host()
    os.environ[place] = "0"
    assert is_first_of_host()
