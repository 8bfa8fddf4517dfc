"""`launch/train.sh` with real runs on the CPU. For `launch/train.sbatch` see test_slurm_here.py and cluster/."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from agsel.runs.checkpoints import missing_part
from agsel.runs.preemption import MARKER, STOP_FILE
from tests.distributed import REPOSITORY, environment, free_port
from tests.live_run import LiveRun, announcing, live_run
from tests.tiny_run import save_model, save_rows, settings

LAUNCH = REPOSITORY / "launch"


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("parts")
    return save_model(folder / "model"), save_rows(folder / "rows.jsonl", 32)


@contextmanager
def local_job(run: Path, parts: tuple[Path, Path], *options: str) -> Iterator[LiveRun]:
    """train.sh with a run of six steps that stays in the third for a while."""
    port = free_port()
    command = [*announcing("step 3", port), *settings(*parts, run, output_dir=None)]
    with live_run(run, ["bash", LAUNCH / "train.sh", *options, run, *command], port) as job:
        yield job


def require_stopped(run: LiveRun) -> int:
    """The run has ended with a marker and the checkpoint of its last step. Returns that step."""
    output = run.ends()
    marker = json.loads((run.folder / MARKER).read_text())
    assert marker["reason"] == "a STOP file on rank 0"
    assert f"stopped   {marker['reason']} after step {marker['step']}; go on with the same command\n" in output
    assert missing_part(run.folder / f"checkpoint-{marker['step']}") is None
    assert not (run.folder / STOP_FILE).exists()
    assert not (run.folder / "model").exists()
    return marker["step"]


def require_finished(folder: Path, output: str, *, resumed_after: int) -> None:
    assert f"checkpoint-{resumed_after}, every file verified" in output
    assert (folder / "model" / "model.safetensors").exists()
    assert not (folder / MARKER).exists()


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        ([], "no run folder"),
        (["run"], "nothing is no command"),
        (["run", "--config", "a.yaml"], "--config is no command"),
        (["run", "a_command_that_is_not_there"], "a_command_that_is_not_there is no command"),
        (["/dev/null/run", "true"], "cannot make the run folder /dev/null/run"),
        (["run", "true", "--output_dir", "other"], "--output_dir: leave it out"),
        (
            ["run", "true", "--resume_from_checkpoint=run/checkpoint-4"],
            "--resume_from_checkpoint=run/checkpoint-4: leave",
        ),
        (["--hostfile", "hosts", "run", "--resume-from-checkpoint", "x"], "--resume-from-checkpoint: leave it out"),
    ],
)
def test_a_command_is_asked_for_before_anything_is_made(words: list[str], complaint: str, tmp_path: Path) -> None:
    found = subprocess.run(["bash", LAUNCH / "train.sh", *words], cwd=tmp_path, capture_output=True, text=True)
    assert found.returncode == 2
    assert found.stderr.startswith("agsel: error: train.sh: ")
    assert found.stderr.count("\n") == 1
    assert complaint in found.stderr
    assert not any(tmp_path.iterdir())


def test_a_run_that_is_refused_is_not_started_again(tmp_path: Path) -> None:
    start = ["deepspeed", "--num_gpus", "2", "--master_port", free_port()]
    run = [*start, LAUNCH / "train.py", "--config", "nowhere.yaml"]
    command = ["bash", LAUNCH / "train.sh", "--restarts", "3", tmp_path / "run", *run]
    found = subprocess.run([*map(str, command)], env=environment(), capture_output=True, text=True)
    assert found.returncode == 2
    assert found.stderr.count("agsel: error: no such file: nowhere.yaml") == 1
    assert "starting it again" not in found.stdout


def test_the_program_of_several_hosts_names_its_command() -> None:
    found = subprocess.run([sys.executable, LAUNCH / "hosts.py", "--help"], capture_output=True, text=True)
    assert (found.returncode, found.stderr.count("\n")) == (2, 1)
    assert "bash launch/train.sh --hostfile HOSTS RUN_FOLDER`" in found.stderr


@pytest.mark.parametrize("name", ["train.sh", "train.sbatch"])
def test_bash_can_read_it(name: str) -> None:
    assert subprocess.run(["bash", "-n", LAUNCH / name], capture_output=True, check=True).stderr == b""


def test_a_signal_to_the_shell_script_stops_the_run_for_good(parts: tuple[Path, Path], tmp_path: Path) -> None:
    """However many restarts are left. A STOP file from before has no effect."""
    run = tmp_path / "run"
    run.mkdir()
    (run / STOP_FILE).touch()
    with local_job(run, parts, "--restarts", "5") as job:
        job.reaches("step 3")
        os.kill(job.process.pid, signal.SIGUSR1)
        assert require_stopped(job) == 3
        assert job.process.returncode == 0
    assert job.output.count("PHASE 0") == 5, "loaded once, three steps and a checkpoint"


def test_the_shell_script_does_not_wait_for_the_dead(tmp_path: Path) -> None:
    """As in a container whose first process takes none of them away, here one that adopts what its children leave."""
    adopt_and_wait = "import ctypes, subprocess, sys; ctypes.CDLL(None).prctl(36, 1); subprocess.run(sys.argv[1:])"
    script = ["bash", LAUNCH / "train.sh", tmp_path / "run", "bash", "-c", "sleep 0.1 & exit"]
    subprocess.run([sys.executable, "-c", adopt_and_wait, *script], check=True, timeout=20)


@pytest.mark.slow
def test_the_shell_script_goes_on_with_a_stopped_run_and_restarts_it(parts: tuple[Path, Path], tmp_path: Path) -> None:
    """The restart waits for ranks that save while their launcher is gone."""
    run = tmp_path / "run"
    with local_job(run, parts) as job:
        job.reaches("step 1")
        os.kill(job.process.pid, signal.SIGTERM)
        step = require_stopped(job)
    with local_job(run, parts, "--restarts", "1") as job:
        ranks = job.reaches("step 3")
        job.send(signal.SIGKILL, "runner", ranks)
        job.ends()
        assert job.process.returncode == 0
    assert f"checkpoint-{step}, every file verified" in job.output
    require_finished(run, job.output, resumed_after=3)
