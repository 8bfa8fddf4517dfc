"""The first seconds of a run: how its ranks find each other, DeepSpeed's operator for the CPU, and a stop meanwhile."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from agsel.errors import UserError
from agsel.runs.claim import LOCK, take
from agsel.runs.preemption import MARKER, STOP_FILE
from agsel.zero.communication import wait_for_other_projects
from tests.distributed import REPOSITORY, environment, free_port
from tests.live_run import LiveRun, announced_run, live_run
from tests.test_launch import said
from tests.tiny_run import save_model, save_rows, settings

OPERATOR = "deepspeed_shm_comm"
JOINING = 12
"""Runs that do no more than join."""
SOON = 5.0
"""Seconds within which a run ends that is told to."""
STOPPED_BETWEEN_LOOKS = """
import sys
from pathlib import Path
import torch.distributed as dist
from agsel.runs import beginning
from agsel.runs.claim import claimed
from agsel.runs.preemption import STOP_FILE, SignalWatch
folder, port = Path(sys.argv[1]), sys.argv[2]
beginning.TICK = 2.0
dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=0, world_size=1)
with beginning.Beginning(SignalWatch()) as begun, claimed(folder, dist.group.WORLD) as claim:
    begun.ranks_have_met()
    begun.has_folder(claim)
    (folder / STOP_FILE).touch()
    begun.is_over(dist.group.WORLD)
    print("trains")
"""


class Starts:
    """Those of tests/starting_worker.py, by name."""

    def __init__(self, run: LiveRun) -> None:
        self._run, self.folder = run, run.folder

    def output(self, name: str) -> str:
        return (self.folder / f"{name}.log").read_text()

    def stop(self, name: str) -> None:
        """With SIGTERM."""
        os.kill(self._number("began", name), signal.SIGTERM)
        asked = time.monotonic()
        self._number("ended", name)
        assert time.monotonic() - asked < SOON, self.output(name)

    def exit_code(self, name: str) -> int:
        return self._number("ended", name)

    def _number(self, event: str, name: str) -> int:
        line = rf"^{event} {name} (-?\d+)$"
        self._run.says(f"(?m){line}")
        [number] = re.findall(line, self._run.output, re.M)
        return int(number)


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A model folder and a data file."""
    folder = tmp_path_factory.mktemp("parts")
    return save_model(folder / "model"), save_rows(folder / "rows.jsonl", 32)


@pytest.fixture(scope="module")
def operators(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of compiled operators, with the lock of a process that was killed while it compiled."""
    folder = tmp_path_factory.mktemp("operators")
    compiled = Path(environment()["TORCH_EXTENSIONS_DIR"], OPERATOR)
    if compiled.exists():
        shutil.copytree(compiled, folder / OPERATOR)
    else:
        (folder / OPERATOR).mkdir()
    (folder / OPERATOR / "lock").touch()
    return folder


@pytest.fixture(scope="module")
def deaf() -> Iterator[socket.socket]:
    """Takes connections, and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(60)
        yield server


def rank(number: int, port: int) -> dict[str, str]:
    """The environment of one of two ranks."""
    common = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return common | {"RANK": str(number), "LOCAL_RANK": str(number)}


@pytest.fixture(scope="module")
def starts(
    parts: tuple[Path, Path], deaf: socket.socket, operators: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Starts]:
    folder = tmp_path_factory.mktemp("starts")
    ours = {"TORCH_EXTENSIONS_DIR": str(operators)}
    of_srun = ours | {"SLURM_STEP_NUM_TASKS": "2"}
    command = settings(*parts, folder / "run")
    cases: dict[str, tuple[dict[str, str], list[str] | None]] = {
        "srun0": (of_srun | {"SLURM_LOCALID": "0"}, command),
        "srun1": (of_srun | {"SLURM_LOCALID": "1"}, command),
        "alone": (ours | rank(0, free_port()), [*command, "--rank_timeout", "5"]),
        "deaf": (ours | rank(1, deaf.getsockname()[1]), command),
        "compiling": ({"TORCH_EXTENSIONS_DIR": "", "XDG_CACHE_HOME": str(folder / "cache")}, command),
    }
    # The port, of `deepspeed --num_gpus 1` for half of them, and shared memory under its name would be common to all.
    common = ours | {"LOCAL_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    only_rank = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    cases |= {f"joining{number}": (common | (only_rank if number % 2 else {}), None) for number in range(JOINING)}
    (folder / "starts.json").write_text(json.dumps(cases))
    worker = [sys.executable, REPOSITORY / "tests" / "starting_worker.py", folder / "starts.json"]
    with live_run(folder, worker, free_port()) as run:
        yield Starts(run)


def test_srun_without_a_rank_for_each_process_is_refused_in_one_line(starts: Starts) -> None:
    """As where a container keeps variables back. Each would train alone, all in one folder."""
    assert [starts.exit_code(f"srun{place}") for place in (0, 1)] == [2, 2]
    words = "agsel: error: srun has started 2 processes, but these do not have SLURM_PROCID, "
    assert [line.startswith(words) for line in said(starts.output("srun0"))] == [True]
    assert not said(starts.output("srun1"))
    assert "Traceback" not in starts.output("srun0") + starts.output("srun1")


def test_a_rank_that_waits_for_the_others_can_be_stopped(starts: Starts, deaf: socket.socket) -> None:
    """In torch, which lets no signal handler of Python's run. The launcher ends the others if it fails."""
    probe, _ = deaf.accept()
    store, _ = deaf.accept()
    with probe, store:
        time.sleep(0.5)
        starts.stop("deaf")
    assert starts.exit_code("deaf") == 1
    assert not said(starts.output("deaf"))
    assert "Traceback" not in starts.output("deaf")


def test_the_first_start_compiles_where_no_other_project_does_and_can_be_stopped(starts: Starts) -> None:
    [lock] = until_found(
        starts.folder / "cache", f"agsel/torch_extensions/python*/{socket.gethostname()}/{OPERATOR}/lock"
    )
    starts.stop("compiling")
    assert starts.exit_code("compiling") == 0
    output = starts.output("compiling")
    assert output.count("compiling DeepSpeed's operator for the CPU, once: ") == 1
    assert output.splitlines()[-1] == (
        "stopped   SIGTERM on rank 0 before training began: nothing to save; start it with the same command"
    )
    assert not said(output)
    assert "Traceback" not in output
    assert not lock.exists()


def test_a_rank_that_waits_for_the_others_gives_up_in_one_line(starts: Starts) -> None:
    assert starts.exit_code("alone") == 1
    words = r"agsel: error: rank 0 of 2 has not met the others at 127.0.0.1:\d+ within 5 s \(--rank_timeout\)"
    assert [bool(re.match(words, line)) for line in said(starts.output("alone"))] == [True]
    assert "Traceback" not in starts.output("alone")


def test_many_runs_at_once_do_not_meet(starts: Starts, operators: Path) -> None:
    """Not on a port, not in shared memory, and not on torch's lock of the operator, which they would wait for."""
    names = [f"joining{number}" for number in range(JOINING)]
    assert {name: starts.exit_code(name) for name in names} == dict.fromkeys(names, 0)
    output = "".join(map(starts.output, names))
    assert output.count("joined 0 of 1, sharing []\n") == JOINING
    assert output.count("cleared   ") == 1
    assert not (operators / OPERATOR / "lock").exists()


def test_the_lock_of_a_process_that_compiles_is_waited_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lock = tmp_path / "lock"
    with lock.open("w") as file:
        holder = subprocess.Popen(["sleep", "1"], pass_fds=[file.fileno()])
    wait_for_other_projects(lock)
    assert holder.wait(5) == 0
    assert not lock.exists()
    output = capsys.readouterr().out
    assert output.count(f"waiting   for process {holder.pid}, ") == 1
    assert output.count("cleared   ") == 1


def until_found(folder: Path, pattern: str) -> list[Path]:
    until = time.monotonic() + 60
    while not (found := [*folder.glob(pattern)]):
        assert time.monotonic() < until
        time.sleep(0.05)
    return found


@pytest.mark.parametrize("reason", ["SIGUSR1 on rank 1", pytest.param("a STOP file on rank 0", marks=pytest.mark.slow)])
def test_a_stop_while_the_model_is_loaded_ends_all_ranks_and_the_folder_is_in_use_until_then(
    parts: tuple[Path, Path], tmp_path: Path, reason: str
) -> None:
    run_folder = tmp_path / "run"
    with announced_run(run_folder, "loading", settings(*parts, run_folder)) as run:
        ranks = run.reaches("loading")
        with pytest.raises(UserError, match=f"in use by the run of host .*, pid {ranks[0]}: choose another folder"):
            take(run_folder)
        if "STOP" in reason:
            (run_folder / STOP_FILE).touch()
        else:
            run.send(signal.SIGUSR1, "rank 1", ranks)
        output = run.ends()
    assert run.process.returncode == 0
    assert output.count(f"stopped   {reason} before training began: nothing to save") == 1
    assert not said(output)
    assert "Traceback" not in output
    marker = json.loads((run_folder / MARKER).read_text())
    assert (marker["reason"], marker["step"], marker["checkpoint"]) == (reason, None, None)
    assert not (run_folder / LOCK).exists()
    assert not (run_folder / STOP_FILE).exists()


def test_a_stop_just_before_training_begins_ends_the_run_before_its_first_step(tmp_path: Path) -> None:
    """Between two looks at the folder, which are far apart here."""
    done = subprocess.run(
        [sys.executable, "-c", STOPPED_BETWEEN_LOOKS, tmp_path, str(free_port())],
        env=environment(),
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.stdout.startswith("stopped   a STOP file on rank 0 before training began"), done.stdout + done.stderr
    assert "trains" not in done.stdout
    assert done.returncode == 0
    assert (tmp_path / MARKER).exists()
    assert not (tmp_path / STOP_FILE).exists()
