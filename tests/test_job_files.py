"""`launch/train.sh` and `launch/train.sbatch` with real runs on the CPU; only Slurm's own commands are stand-ins."""

from __future__ import annotations

import json
import os
import signal
import subprocess
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
SRUN = """#!/usr/bin/env bash
[ "$1" = --kill-on-bad-exit=1 ] && shift
for ((task = 0; task < SLURM_NTASKS; task++)); do SLURM_PROCID=$task SLURM_LOCALID=$task "$@" & done
wait
"""
SCONTROL = """#!/usr/bin/env bash
case $1 in
  show) echo 127.0.0.1 ;;
  *) echo "$@" >> "$SCONTROL_LOG" ;;
esac
"""


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("parts")
    return save_model(folder / "model"), save_rows(folder / "rows.jsonl", 32)


@pytest.fixture
def slurm(tmp_path: Path) -> dict[str, str]:
    """The environment of a job of two tasks on one host."""
    commands = tmp_path / "bin"
    commands.mkdir()
    for name, text in {"srun": SRUN, "scontrol": SCONTROL}.items():
        (commands / name).write_text(text)
        (commands / name).chmod(0o755)
    job = {"SLURM_JOB_ID": str(os.getpid()), "SLURM_JOB_NODELIST": "here", "SLURM_NTASKS": "2"}
    job |= {"SLURM_NTASKS_PER_NODE": "2"}
    path = f"{commands}{os.pathsep}{environment()['PATH']}"
    return job | {"SLURM_CPUS_PER_TASK": "1", "SCONTROL_LOG": str(tmp_path / "scontrol"), "PATH": path}


@contextmanager
def local_job(run: Path, parts: tuple[Path, Path], *options: str) -> Iterator[LiveRun]:
    """train.sh with a run of six steps that stays in the third for a while."""
    port = free_port()
    command = [*announcing("step 3", port), *settings(*parts, run, output_dir=None)]
    with live_run(run, ["bash", LAUNCH / "train.sh", *options, run, *command], port) as job:
        yield job


@contextmanager
def slurm_job(run: Path, parts: tuple[Path, Path], slurm: dict[str, str], steps: int) -> Iterator[LiveRun]:
    """train.sbatch."""
    arguments = settings(*parts, run, output_dir=None, max_steps=steps, logging_steps=1)
    port = 20000 + int(slurm["SLURM_JOB_ID"]) % 10000
    with live_run(run, ["bash", LAUNCH / "train.sbatch", run, *arguments], port, slurm) as job:
        yield job


def require_stopped(run: LiveRun) -> int:
    """The run has ended with a marker and the checkpoint of its last step. Returns that step."""
    run.ends()
    marker = json.loads((run.folder / MARKER).read_text())
    assert marker["reason"] == "a STOP file on rank 0"
    assert missing_part(run.folder / f"checkpoint-{marker['step']}") is None
    assert not (run.folder / STOP_FILE).exists()
    assert not (run.folder / "model").exists()
    return marker["step"]


def require_finished(folder: Path, output: str, *, resumed_after: int) -> None:
    assert f"checkpoint-{resumed_after}, every file verified" in output
    assert (folder / "model" / "model.safetensors").exists()
    assert not (folder / MARKER).exists()


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


def test_slurm_tells_every_rank_its_place(slurm: dict[str, str], tmp_path: Path) -> None:
    """Two tasks on each of two hosts; Python is a stand-in too."""
    python = tmp_path / "bin" / "python"
    python.write_text('#!/usr/bin/env bash\necho "$RANK $WORLD_SIZE $LOCAL_WORLD_SIZE $1 $2"\n')
    python.chmod(0o755)
    command = ["bash", LAUNCH / "train.sbatch", tmp_path / "run", "--method", "topk"]
    job = environment() | slurm | {"SLURM_NTASKS": "4"}
    printed = subprocess.run(command, env=job, capture_output=True, text=True, check=True).stdout
    assert sorted(printed.splitlines()) == [f"{rank} 4 2 launch/train.py --method" for rank in range(4)]


@pytest.mark.slow
def test_slurms_warning_saves_the_run_and_queues_it_again(
    parts: tuple[Path, Path], slurm: dict[str, str], tmp_path: Path
) -> None:
    run, requests = tmp_path / "run", Path(slurm["SCONTROL_LOG"])
    with slurm_job(run, parts, slurm, 100_000) as job:
        job.says(r"step +3/100000")
        os.kill(job.process.pid, signal.SIGUSR1)
        step = require_stopped(job)
    assert requests.read_text() == f"requeue {slurm['SLURM_JOB_ID']}\n"
    requests.unlink()
    with slurm_job(run, parts, slurm, step + 3) as job:
        require_finished(run, job.ends(), resumed_after=step)
        assert job.process.returncode == 0
    assert not requests.exists(), "a finished run is not queued again"


@pytest.mark.slow
def test_a_cancelled_slurm_job_saves_the_run_and_ends(
    parts: tuple[Path, Path], slurm: dict[str, str], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    with slurm_job(run, parts, slurm, 100_000) as job:
        job.says("/100000  loss")
        os.kill(job.process.pid, signal.SIGTERM)
        require_stopped(job)
    assert not Path(slurm["SCONTROL_LOG"]).exists()
